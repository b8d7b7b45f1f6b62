"""Stored shards of global arrays: their entries in the manifest, and the reader that reshards them.

Ranks may shard arrays differently from the ranks that saved them: a wanted shard is assembled from the stored shards
that overlap it, one tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hvdlm.checkpoints.errors import CheckpointError
from hvdlm.checkpoints.safetensors_io import open_tensors
from hvdlm.io import untrusted_input
from hvdlm.io.atomic_files import sha256
from hvdlm.io.untrusted_input import shown
from hvdlm.parallel.flat_layout import Shard

KINDS = {"parameters/": "model", "optimizer/": "optimizer", "carry/": "carry"}
"""Prefix of a tensor's name: prefix of the files that hold it."""

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BOOL": "bool"} | {
    f"{letter}{bits}": f"{name}{bits}" for letter, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
}
_NAMES = {numpy: name for name, numpy in _DTYPES.items()}
_MAX_NAME = 1024  # characters of a tensor's name
_MAX_AXES = 32
_MAX_ELEMENTS = 2**60  # of one array; offsets and sizes in bytes stay below 2**63


@dataclass(frozen=True)
class Stored:
    """A shard of a global array in a file.

    ``dtype``: its name in safetensors (``F32``); ``alias``: the array's name in the file, where it is not its own.
    """

    file: str
    dtype: str
    shard: Shard
    alias: str = ""

    @property
    def numpy(self) -> np.dtype[Any]:
        """The numpy dtype."""
        return np.dtype(_DTYPES[self.dtype])


def kind(name: str) -> str:
    """Return the prefix of the files that hold the tensor ``name``."""
    return KINDS[name.partition("/")[0] + "/"]


def key(name: str) -> str:
    """Return the name that the tensor ``name`` has in its file."""
    return name.removeprefix("parameters/")


def to_json(array: np.ndarray, shard: Shard) -> dict[str, Any]:
    """Return the manifest's entry, without its file, of ``array``, which holds ``shard`` of a global array."""
    if array.shape != shard.held:
        raise ValueError(f"an array of shape {array.shape} can't hold {shard}")
    return {
        "dtype": _NAMES[array.dtype.name],
        "shape": list(shard.shape),
        "start": list(shard.start),
        "extent": list(shard.extent),
        "flat": None if shard.flat is None else list(shard.flat),
    }


def from_json(tensors: Mapping[str, Any], files: Mapping[str, Any]) -> dict[str, list[Stored]]:
    """Return a manifest's ``tensors``, which is untrusted input, checked against itself and ``files``.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: hvdlm didn't write it.
    """
    checked = {}
    bytes_left = {file: entry["bytes"] for file, entry in files.items()}
    for name, entries in tensors.items():
        if not name.startswith(tuple(KINDS)) or len(name) > _MAX_NAME or not name.isprintable():
            raise ValueError(f"it names a tensor {shown(repr(name))}")
        stored = [_stored(name, entry, files) for entry in entries]
        for candidate in stored:
            bytes_left[candidate.file] -= math.prod(candidate.shard.held) * candidate.numpy.itemsize
            if bytes_left[candidate.file] < 0:
                raise ValueError(f"{candidate.file} is too small for its slice of {name}")
        # A file has one array of a name: slices in one file would be the same memory claimed many times.
        distinct = len({s.shard for s in stored}) == len({s.file for s in stored}) == len(stored)
        if not distinct or len({(s.shard.shape, s.dtype) for s in stored}) != 1:
            raise ValueError(f"the slices of {name} contradict each other")
        checked[name] = stored
    return checked


def _stored(name: str, entry: Mapping[str, Any], files: Mapping[str, Any]) -> Stored:
    file, dtype, flat = entry["file"], entry["dtype"], entry["flat"]
    shape, start, extent = (_numbers(name, entry[field]) for field in ("shape", "start", "extent"))
    shard = Shard(shape, start, extent, None if flat is None else _pair(name, flat))
    if file not in files or not file.startswith(kind(name)):
        raise ValueError(f"{name} is claimed to be in {shown(repr(file))}")
    if dtype not in _DTYPES:
        raise ValueError(f"{name} has the dtype {shown(repr(dtype))}")
    inside = len(shape) == len(start) == len(extent) and all(
        a + n <= whole for a, n, whole in zip(start, extent, shape, strict=True)
    )
    if not inside or (shard.flat and not shard.flat[0] <= shard.flat[1] <= math.prod(extent)):
        raise ValueError(f"a slice of {name} lies outside of it")
    return Stored(file, dtype, shard)


def _numbers(name: str, value: Any) -> tuple[int, ...]:
    # isinstance would take a bool for an int.
    if not isinstance(value, list) or not all(type(n) is int and 0 <= n <= _MAX_ELEMENTS for n in value):
        raise ValueError(f"a slice of {name} is cut at {shown(repr(value))}")
    if len(value) > _MAX_AXES or math.prod(n or 1 for n in value) > _MAX_ELEMENTS:
        raise ValueError(f"{name} is claimed to be larger than any array")
    return tuple(value)


def _pair(name: str, value: Any) -> tuple[int, int]:
    first, last = _numbers(name, value)
    return first, last


class Reader:
    """Reads shards from a checkpoint's files, each file's SHA-256 verified before anything in it is used.

    ``verified``: the hashes have been verified already.
    """

    def __init__(
        self, folder: Path, files: Mapping[str, Any], tensors: Mapping[str, Sequence[Stored]], verified: bool = False
    ) -> None:
        self._folder = folder
        self._files = files
        self._tensors = tensors
        self._verified = verified
        self._opened: dict[str, Any] = {}

    def read(self, name: str, wanted: Shard) -> np.ndarray:
        """Return the shard ``wanted`` of the tensor ``name``, of shape ``wanted.held``.

        Raises:
            CheckpointError: the stored slices don't cover it, or a file is damaged.
        """
        array = self.read_if_covered(name, wanted)
        if array is None:
            raise self._damaged(f"a slice of {name} is missing")
        return array

    def read_if_covered(self, name: str, wanted: Shard) -> np.ndarray | None:
        """Return what ``read`` returns, or None where the stored slices don't cover it."""
        stored = self._tensors[name]
        same = next((s for s in stored if s.shard == wanted), None)
        if same:
            return self._read_slice(name, same)
        # Checked before memory is allocated for elements that the manifest only claims to have.
        if sum(math.prod(s.shard.held) for s in stored) < math.prod(stored[0].shard.shape):
            return None
        target = _narrowed(wanted)
        box = np.empty(target.extent, stored[0].numpy)
        missing = _elements(target)
        for candidate in stored:
            self._fill(box, missing, target, name, candidate)
        if missing.any():
            return None
        return box if target.flat is None else box.reshape(-1)[slice(*target.flat)].copy()

    def _fill(self, box: np.ndarray, missing: np.ndarray, target: Shard, name: str, stored: Stored) -> None:
        """Copy the ``missing`` elements of ``target`` that ``stored`` has into ``box``."""
        source = _narrowed(stored.shard)
        overlap = [
            (max(a, b), min(a + n, b + m))
            for a, n, b, m in zip(target.start, target.extent, source.start, source.extent, strict=True)
        ]
        if any(low >= high for low, high in overlap):
            return
        # The ellipsis keeps a slice of a zero-dimensional array an array.
        in_target: tuple[Any, ...] = (..., *_within(overlap, target.start))
        in_source: tuple[Any, ...] = (..., *_within(overlap, source.start))
        copied = missing[in_target] & _elements(source)[in_source]
        if not copied.any():
            return
        if source.flat is None:
            np.copyto(box[in_target], self._read_slice(name, stored, in_source[1:]), where=copied)
        else:
            values = np.empty(source.extent, box.dtype)
            values.reshape(-1)[slice(*source.flat)] = self._read_slice(name, stored)
            np.copyto(box[in_target], values[in_source], where=copied)
        missing[in_target] &= ~copied

    def _read_slice(self, name: str, stored: Stored, index: tuple[Any, ...] = ()) -> np.ndarray:
        file = self._open(stored.file)

        own = stored.alias or key(name)

        def read() -> np.ndarray | None:
            tensor = file.get_slice(own)
            if (tensor.get_dtype(), tuple(tensor.get_shape())) != (stored.dtype, stored.shard.held):
                return None
            return tensor[index] if index else file.get_tensor(own)

        array = self._guarded(stored.file, read)
        if array is None:
            raise self._damaged(f"{name} in {stored.file} is not what the manifest says")
        return array

    def read_rank_file(self, name: str) -> dict[str, np.ndarray]:
        """Return all tensors of the file of a single rank, ``exchange/...``; none where there is no such file.

        Raises:
            CheckpointError: it is damaged, or holds anything else.
        """
        if name not in self._files:
            return {}
        file = self._open(name)
        tensors = self._guarded(name, lambda: {tensor: file.get_tensor(tensor) for tensor in file.keys()})
        for tensor in tensors:
            if not tensor.startswith("exchange/"):
                raise self._damaged(f"{name} holds {shown(repr(tensor))}")
        return tensors

    def _open(self, name: str) -> Any:
        if name not in self._opened:
            self._opened[name] = self._guarded(name, lambda: self._open_file(name))
        return self._opened[name]

    def _open_file(self, name: str) -> Any:
        path = self._folder / name
        # Checked as the manifest's reader did: the file may have been replaced since.
        untrusted_input.size(path, within=self._folder)
        if not self._verified and sha256(path) != self._files[name]["sha256"]:
            raise self._damaged(f"{name} has another SHA-256")
        return open_tensors(path, self._folder)

    def _guarded(self, file: str, action: Callable[[], Any]) -> Any:
        """Return the result of ``action``, which reads ``file``; the library may fail in any way on its content."""
        try:
            return untrusted_input.guarded(action)
        except ValueError as error:
            raise self._damaged(f"{file}: {error}") from error

    def _damaged(self, reason: str) -> CheckpointError:
        return CheckpointError(self._folder, reason)


def _narrowed(shard: Shard) -> Shard:
    """Return the same elements as a shard of the smallest box of whole rows (of the first dimension)."""
    if shard.flat is None or not shard.extent:
        return shard
    row = max(1, math.prod(shard.extent[1:]))
    first, last = shard.flat[0] // row, -(-shard.flat[1] // row)
    return replace(
        shard,
        start=(shard.start[0] + first, *shard.start[1:]),
        extent=(max(0, last - first), *shard.extent[1:]),
        flat=(shard.flat[0] - first * row, shard.flat[1] - first * row),
    )


def _elements(shard: Shard) -> np.ndarray:
    """Return bool ``[*extent]``: the elements of its box that a shard holds."""
    if shard.flat is None:
        return np.ones(shard.extent, bool)
    mask = np.zeros(shard.extent, bool)
    mask.reshape(-1)[slice(*shard.flat)] = True
    return mask


def _within(overlap: list[tuple[int, int]], start: Sequence[int]) -> Iterator[slice]:
    """Yield the slices of ``overlap`` in a box that begins at ``start``."""
    for (low, high), first in zip(overlap, start, strict=True):
        yield slice(low - first, high - first)
