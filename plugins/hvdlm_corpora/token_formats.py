"""Formats of token files of other frameworks: nanoGPT, llm.c and Megatron-LM.

nanoGPT (``data/*/prepare.py``): uint16 ids without a header. llm.c (``dev/data/data_common.py``): a header of 256 int32
(magic number, version, number of ids), then the ids. Megatron-LM (``megatron/core/datasets/indexed_dataset.py``): ids
alone in NAME.bin; in NAME.idx the lengths of sequences, where each begins, and the first sequence of every document.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hvdlm.data.documents import Documents
from hvdlm.errors import HvdlmError, RankError
from hvdlm.io import untrusted_input
from hvdlm.io.untrusted_input import shown

_HEADER_INTS = 256  # of llm.c
_LLM_C: dict[tuple[int, int], np.dtype] = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}
_LLM_C_MAGICS = range(20240000, 20250000)  # dates; no id of GPT-2 is as large as the first half of such a number
_INDEX_MAGIC = b"MMIDIDX\0\0"
_INDEX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype, sequences, entries of the index of documents
# Codes of Megatron's dtypes for ids. An int32 that is negative becomes larger than any vocabulary.
_INDEX_DTYPES: dict[int, np.dtype] = {1: np.dtype("u1"), 4: np.dtype("<u4"), 8: np.dtype("<u2")}
_CHECKED = 1 << 16  # sequences that are checked at once
_BLOCKS = 16  # of them, in a large index


@dataclass(frozen=True)
class Shard:
    """``count`` ids of a file from id ``first`` on; ``documents``: of the whole file, None where there is no index."""

    path: Path
    dtype: np.dtype
    first: int
    count: int
    documents: Documents | None = None


def read_shard(path: Path) -> Shard:
    """Return what the token file ``path`` holds, checked; ids are not read.

    Raises:
        HvdlmError: the file can't be read, is damaged, or is of another kind.
    """
    try:
        index = path.with_suffix(".idx")
        if index.exists():
            return _megatron(path, index)
        return _plain(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise HvdlmError(
            f"data.path {path}: it can't be read as a token file ({shown(reason, 200)}): name the .bin file of "
            "nanoGPT, llm.c or Megatron-LM, and write it again if it is damaged."
        ) from error


def _plain(path: Path) -> Shard:
    """Read the header of llm.c, if there is one, else take the file for one of nanoGPT."""
    size = untrusted_input.size(path)
    with path.open("rb") as file:
        head = file.read(4 * _HEADER_INTS)
    header = np.frombuffer(head[: len(head) // 4 * 4], "<i4")
    magic = int(header[0]) if len(header) else 0
    if magic not in _LLM_C_MAGICS:
        if size % 2:
            raise ValueError(f"it has {size} bytes, and ids of nanoGPT have 2 each")
        return Shard(path, np.dtype("<u2"), 0, size // 2)
    if len(header) < _HEADER_INTS:
        raise ValueError("its header is truncated")
    version, count = int(header[1]), int(header[2])
    dtype = _LLM_C.get((magic, version))
    if dtype is None:
        raise ValueError(f"llm.c's magic number {magic} with version {version} is not that of token files")
    if count < 0 or size != 4 * _HEADER_INTS + count * dtype.itemsize:
        raise ValueError(f"it has {size} bytes, its header says {count} ids of {dtype.itemsize} bytes")
    return Shard(path, dtype, 4 * _HEADER_INTS // dtype.itemsize, count)


def _megatron(path: Path, index_path: Path) -> Shard:
    index = MegatronIndex(index_path)
    size = untrusted_input.size(path)
    if size != index.tokens * index.dtype.itemsize:
        raise ValueError(f"it has {size} bytes, and {index_path.name} describes {index.tokens * index.dtype.itemsize}")
    return Shard(path, index.dtype, 0, index.tokens, index)


class MegatronIndex:
    """The ``.idx`` file of a token file, as an index of documents of which blocks are read when they are needed.

    Attributes:
        dtype: of an id.
        tokens: ids of all sequences.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        size = untrusted_input.size(path)
        head = self._read(0, _INDEX_HEADER.size)
        magic, version, code, sequences, entries = _INDEX_HEADER.unpack(head)
        if magic != _INDEX_MAGIC:
            raise ValueError(f"{path.name} doesn't begin as an index of Megatron does")
        if version != 1:
            raise ValueError(f"{path.name} is of version {version}, not 1")
        if code not in _INDEX_DTYPES:
            raise ValueError(f"{path.name} has the dtype {code}: ids are of uint8 (1), int32 (4) or uint16 (8)")
        self.dtype = _INDEX_DTYPES[code]
        self._sequences = sequences
        self._lengths = _INDEX_HEADER.size
        self._pointers = self._lengths + 4 * sequences
        self._entries = self._pointers + 8 * sequences
        if size != self._entries + 8 * entries:
            raise ValueError(
                f"{path.name} has {size} bytes, its header says {sequences} sequences and {entries} entries for "
                "documents"
            )
        if entries < 1:
            raise ValueError(f"{path.name} lists no documents")
        self._documents = entries - 1  # the last entry ends the last document
        self.tokens = self._check()

    def __len__(self) -> int:
        return self._documents

    def __getitem__(self, numbers: slice) -> np.ndarray:
        """Return the positions of some documents, which follow each other, int64 ``[n]``.

        Raises:
            RankError: the file no longer holds them.
        """
        first, last, _ = numbers.indices(len(self))
        if first >= last:
            return np.zeros(0, np.int64)
        try:
            sequences = self._array(self._entries, first, last)
            low, high = int(sequences.min()), min(int(sequences.max()) + 1, self._sequences)
            if low < 0 or sequences.max() > self._sequences:
                raise ValueError("documents don't follow each other")
            pointers = self._array(self._pointers, low, high) // self.dtype.itemsize
        except (OSError, ValueError) as error:
            raise RankError(
                f"{self._path} can't be read ({error}): give the whole file, and resume the run."
            ) from error
        # Documents without a sequence may follow the last sequence.
        positions: np.ndarray = np.append(pointers, self.tokens)[sequences - low]
        return positions

    def _check(self) -> int:
        """Check that sequences follow each other in the file, of a large index in some blocks; return the tokens."""
        for first, last in _blocks(self._sequences):
            ends = self._ends(first, last)
            starts = self._array(self._pointers, first, min(last + 1, self._sequences))
            if (starts[1:] != ends[: len(starts) - 1]).any() or (ends < starts[: len(ends)]).any():
                raise ValueError(f"in {self._path.name}, sequences don't follow each other")
            if first == 0 and starts[0] != 0:
                raise ValueError(f"{self._path.name} points to byte {starts[0]} for the first sequence")
        for first, last in _blocks(self._documents + 1):
            entries = self._array(self._entries, first, last)
            if (np.diff(entries) < 0).any() or entries.min() < 0 or entries.max() > self._sequences:
                raise ValueError(f"in {self._path.name}, documents don't follow each other")
        if self._sequences == 0:
            return 0
        end = int(self._ends(self._sequences - 1, self._sequences)[0])
        if end < 0 or end % self.dtype.itemsize:
            raise ValueError(f"{self._path.name} ends at byte {end}")
        return end // self.dtype.itemsize

    def _ends(self, first: int, last: int) -> np.ndarray:
        """Return the bytes of the file before the end of each of some sequences."""
        lengths = np.frombuffer(self._read(self._lengths + 4 * first, 4 * (last - first)), "<i4").astype(np.int64)
        return self._array(self._pointers, first, last) + lengths * self.dtype.itemsize

    def _array(self, base: int, first: int, last: int) -> np.ndarray:
        return np.frombuffer(self._read(base + 8 * first, 8 * (last - first)), "<i8")

    def _read(self, offset: int, size: int) -> bytes:
        descriptor = os.open(self._path, os.O_RDONLY)
        try:
            data = os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)
        if len(data) != size:
            raise ValueError(f"{self._path.name} is truncated")
        return data


def _blocks(count: int) -> Iterator[tuple[int, int]]:
    """Yield the ends of all blocks of ``count`` entries, or of some where there are many: opening must be fast."""
    blocks = -(-count // _CHECKED)
    for number in np.unique(np.linspace(0, blocks - 1, min(blocks, _BLOCKS), dtype=np.int64)).tolist():
        yield number * _CHECKED, min((number + 1) * _CHECKED, count)
