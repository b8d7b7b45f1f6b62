"""Token folders: a file of token ids, a JSON header and a tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hvdlm.data import tokenizers
from hvdlm.data.documents import Documents, SplitDocuments
from hvdlm.data.tokenizer_base import Tokenizer
from hvdlm.errors import HvdlmError, RankError
from hvdlm.io import untrusted_input
from hvdlm.io.untrusted_input import shown

FORMAT = "hvdlm-tokens-2"
INDEXED_FORMAT = "hvdlm-tokens-3"
"""Format of folders with an index of documents (``documents.bin``), and ``documents``, their number, in the header."""

MARKED_FORMAT = "hvdlm-tokens-4"
"""Format of folders with an index of documents and a byte for every token, 1 if it is a target (``targets.bin``)."""

DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_POSITION = np.dtype("<i8")
_LIMIT = 1 << 26  # bytes; hvdlm writes no larger header
_KEYS = {"format", "dtype", "train", "validation", "validation_bytes", "tokenizer", "sources"}
_COUNT = 1 << 53  # JSON readers keep integers exact up to here
_CHECKED = 1 << 24  # ids; checking so many when a folder is opened takes some milliseconds
_BLOCK = 1 << 16  # ids that are checked at once


class Tokens(Protocol):
    """Token ids, unsigned integers ``[n]``: an array, or a part of a file."""

    def __len__(self) -> int: ...

    def __getitem__(self, ids: slice, /) -> np.ndarray: ...


class StoredTokens:
    """``count`` ids (or positions) of a file from id ``first`` on, read when they are asked for by a slice.

    The file isn't memory-mapped: one that is truncated during a run, or a network file system that fails, would end the
    rank with a signal instead of an error.

    Args:
        path: the file.
        dtype: of an id.
        first: ids, or a header of that size, before the first one.
        count: the number of ids.
        advice: what to do about a truncated file; None: delete its folder.
    """

    def __init__(self, path: Path, dtype: np.dtype, first: int, count: int, advice: str | None = None) -> None:
        self._path, self._dtype, self._first, self._count = path, dtype, first, count
        self._advice = advice or f"delete {path.parent}"
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, ids: slice) -> np.ndarray:
        """Return a part without a step, as a read-only array.

        Raises:
            RankError: the file no longer holds it.
        """
        first, last, _ = ids.indices(self._count)
        size = max(0, last - first) * self._dtype.itemsize
        try:
            content = os.pread(self._descriptor, size, (self._first + first) * self._dtype.itemsize)
        except OSError as error:
            raise RankError(f"{self._path} can't be read: {error.strerror}.") from error
        if len(content) != size:
            raise RankError(f"{self._path} has been truncated while it was in use: {self._advice}.")
        return np.frombuffer(content, self._dtype)


@dataclass(frozen=True)
class TokenData:
    """An open token folder, or open token files of another framework.

    Attributes:
        folder: its path, or that of the first file.
        tokenizer: the tokenizer of its ids.
        train: ids of the training split, unsigned integers ``[n]``, read from the file when they are needed.
        validation: those of the validation split.
        validation_bytes: bytes of the validation text; 0 where the tokenizer doesn't preserve the text.
        fingerprint: hash of the texts, the tokenizer and the split; not of the paths, which may differ between nodes.
        train_documents: where the documents of the training split begin; None: there is no index of documents.
        validation_documents: where those of the validation split begin.
        train_targets: uint8 for every token of the training split, 1 where it is a target; None: all tokens are.
        validation_targets: that of the validation split.
    """

    folder: Path
    tokenizer: Tokenizer
    train: Tokens
    validation: Tokens
    validation_bytes: int
    fingerprint: str
    train_documents: Documents | None = None
    validation_documents: Documents | None = None
    train_targets: Tokens | None = None
    validation_targets: Tokens | None = None


def is_prepared(paths: Sequence[str]) -> bool:
    """Return whether ``paths`` name a token folder."""
    return len(paths) == 1 and (Path(paths[0]) / "header.json").is_file()


def open_tokens(folder: Path) -> TokenData:
    """Open a token folder and check it.

    Raises:
        HvdlmError: it is damaged or foreign.
    """
    try:
        header = _header(folder)
        dtype, counts = DTYPES[header["dtype"]], [header["train"], header["validation"]]
        size = untrusted_input.size(folder / "tokens.bin", within=folder)
        if size != sum(counts) * dtype.itemsize:
            raise ValueError(f"tokens.bin has {size} bytes, the header says {sum(counts)} tokens of {dtype.itemsize}")
        tokenizer = tokenizers.read(folder / "tokenizer.json", folder)
        if tokenizer.hash != header["tokenizer"]:
            raise ValueError("its tokenizer isn't the one that encoded its tokens")
        path = folder / "tokens.bin"
        if (most := highest(StoredTokens(path, dtype, 0, sum(counts)))) >= tokenizer.vocab:
            raise ValueError(f"tokens.bin holds the id {most}, the vocabulary has {tokenizer.vocab} entries")
        train, validation = StoredTokens(path, dtype, 0, counts[0]), StoredTokens(path, dtype, *counts)
        documents = _documents(folder, header, *counts)
        targets = _targets(folder, header, *counts)
        size = header["validation_bytes"]
        return TokenData(folder, tokenizer, train, validation, size, _fingerprint(header), *documents, *targets)
    except (ValueError, OSError, RecursionError, HvdlmError) as error:
        reason = shown(str(error).rstrip("."), 250)
        raise HvdlmError(
            f"token folder {folder} is damaged or foreign: {reason}: delete it and prepare it again."
        ) from error


def _documents(
    folder: Path, header: dict[str, Any], train: int, validation: int
) -> tuple[Documents | None, Documents | None]:
    """Return where the documents of both splits begin, None where there is no index."""
    if header["format"] not in (INDEXED_FORMAT, MARKED_FORMAT):
        return None, None
    path, count = folder / "documents.bin", header["documents"]
    size = untrusted_input.size(path, within=folder)
    if size != count * _POSITION.itemsize:
        raise ValueError(f"documents.bin has {size} bytes, the header says {count} documents")
    index = StoredTokens(path, _POSITION, 0, count)
    return SplitDocuments(index, 0, train), SplitDocuments(index, train, train + validation)


def _targets(
    folder: Path, header: dict[str, Any], train: int, validation: int
) -> tuple[StoredTokens | None, StoredTokens | None]:
    """Return which tokens of both splits are targets, None where all are."""
    if header["format"] != MARKED_FORMAT:
        return None, None
    path, dtype = folder / "targets.bin", np.dtype("u1")
    if (size := untrusted_input.size(path, within=folder)) != train + validation:
        raise ValueError(f"targets.bin has {size} bytes, the header says {train + validation} tokens")
    if highest(StoredTokens(path, dtype, 0, size)) > 1:
        raise ValueError("targets.bin holds other bytes than 0 and 1")
    return StoredTokens(path, dtype, 0, train), StoredTokens(path, dtype, train, validation)


def _header(folder: Path) -> dict[str, Any]:
    """Return the header, which is untrusted, after checking the types of all entries that are used."""
    header = untrusted_input.read_json(folder / "header.json", _LIMIT, folder)
    if not isinstance(header, dict):
        raise ValueError("header.json is not a mapping")
    if missing := _KEYS - header.keys():
        raise ValueError(f"its header lacks {', '.join(sorted(missing))}")
    digests = header["sources"]
    if not isinstance(digests, dict) or not all(isinstance(digest, str) for digest in digests.values()):
        raise ValueError(f"its sources are {shown(repr(digests))}")
    if header["format"] not in (FORMAT, INDEXED_FORMAT, MARKED_FORMAT):
        raise ValueError(f"its format is {shown(repr(header['format']))}, not {FORMAT!r} to {MARKED_FORMAT!r}")
    if not isinstance(header["dtype"], str) or header["dtype"] not in DTYPES:
        raise ValueError(f"{shown(repr(header['dtype']))} is not a dtype of tokens")
    indexed = header["format"] != FORMAT
    for name in ("train", "validation", "validation_bytes", *(("documents",) if indexed else ())):
        if type(header.get(name)) is not int or not 0 <= header[name] < _COUNT:
            raise ValueError(f"its {name} is {shown(repr(header.get(name)))}")
    return header


def _fingerprint(header: dict[str, Any]) -> str:
    # Without the format: a run may continue on the same tokens with an index of documents.
    marked = [MARKED_FORMAT] if header["format"] == MARKED_FORMAT else []
    settings = [FORMAT, *marked, *(header[name] for name in ("dtype", "train", "validation", "tokenizer"))]
    return hashlib.sha256(json.dumps([settings, sorted(header["sources"].values())]).encode()).hexdigest()


def spot_checked(tokens: Tokens) -> Iterator[np.ndarray]:
    """Yield all ids in blocks, or in a large file 64 of the blocks: opening must be fast."""
    starts: Sequence[int] = range(0, len(tokens), _BLOCK)
    if len(tokens) > _CHECKED:
        starts = np.linspace(0, len(tokens) - _BLOCK, 64, dtype=np.int64).tolist()
    return (tokens[start : start + _BLOCK] for start in starts)


def highest(tokens: Tokens) -> int:
    """Return the highest id of the blocks that are checked, -1 without any."""
    return max((int(block.max()) for block in spot_checked(tokens)), default=-1)
