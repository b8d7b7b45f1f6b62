"""Pieces of global arrays on disk: what a checkpoint's manifest says of them, and how other pieces are put together.

What was saved by ranks that cut arrays in one way is read by ranks that cut them in another: every wanted piece is
assembled from the stored ones that overlap it, one tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hvdlm.checkpoints.safetensors_io import open_tensors
from hvdlm.errors import HvdlmError
from hvdlm.io import untrusted_input
from hvdlm.io.atomic_files import sha256
from hvdlm.io.untrusted_input import shown
from hvdlm.parallel.flat_layout import Shard

KINDS = {"parameters/": "model", "optimizer/": "optimizer", "carry/": "carry"}
"""Which files hold tensors whose names begin so."""

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BOOL": "bool"} | {
    f"{letter}{bits}": f"{name}{bits}" for letter, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
}
_NAMES = {numpy: name for name, numpy in _DTYPES.items()}
_NAME = 1024  # characters of a tensor's name
_AXES = 32
_ELEMENTS = 2**60  # of one array: what is computed from it stays below 2**63


@dataclass(frozen=True)
class Stored:
    """A piece of a global array in a file. ``dtype``: as safetensors calls it (``F32``)."""

    file: str
    dtype: str
    shard: Shard

    @property
    def numpy(self) -> np.dtype[Any]:
        """The dtype as numpy's."""
        return np.dtype(_DTYPES[self.dtype])


def kind(name: str) -> str:
    """Return the first word of the files that hold the tensor ``name``."""
    return KINDS[name.partition("/")[0] + "/"]


def key(name: str) -> str:
    """Return what the tensor ``name`` is called in its file."""
    return name.removeprefix("parameters/")


def to_json(array: np.ndarray, shard: Shard) -> dict[str, Any]:
    """Return the manifest's entry, but for its file, of ``array``, which is ``piece`` of a global array."""
    if array.shape != shard.held:
        raise ValueError(f"an array of shape {array.shape} is said to be {shard}")
    flat = None if shard.flat is None else list(shard.flat)
    cut = {"shape": list(shard.shape), "start": list(shard.start), "extent": list(shard.extent), "flat": flat}
    return {"dtype": _NAMES[array.dtype.name], **cut}


def from_json(tensors: Mapping[str, Any], files: Mapping[str, Any]) -> dict[str, list[Stored]]:
    """Return a manifest's ``tensors``, which may hold anything, checked against each other and ``files``.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is no manifest of ours.
    """
    found = {}
    room = {file: entry["bytes"] for file, entry in files.items()}
    for name, entries in tensors.items():
        if not name.startswith(tuple(KINDS)) or len(name) > _NAME or not name.isprintable():
            raise ValueError(f"it names a tensor {shown(repr(name))}")
        stored = [_stored(name, entry, files) for entry in entries]
        for one in stored:
            room[one.file] -= math.prod(one.shard.held) * one.numpy.itemsize
            if room[one.file] < 0:
                raise ValueError(f"{one.file} is too small for its slice of {name}")
        # A file has one array of a name: slices in one file would be the same memory claimed many times.
        apart = len({s.shard for s in stored}) == len({s.file for s in stored}) == len(stored)
        if not apart or len({(s.shard.shape, s.dtype) for s in stored}) != 1:
            raise ValueError(f"the slices of {name} contradict each other")
        found[name] = stored
    return found


def _stored(name: str, entry: Mapping[str, Any], files: Mapping[str, Any]) -> Stored:
    file, dtype, flat = entry["file"], entry["dtype"], entry["flat"]
    shape, start, extent = (_numbers(name, entry[what]) for what in ("shape", "start", "extent"))
    shard = Shard(shape, start, extent, None if flat is None else _pair(name, flat))
    if file not in files or not file.startswith(kind(name)):
        raise ValueError(f"{name} is said to be in {shown(repr(file))}")
    if dtype not in _DTYPES:
        raise ValueError(f"{name} has the dtype {shown(repr(dtype))}")
    inside = len(shape) == len(start) == len(extent) and all(
        a + n <= whole for a, n, whole in zip(start, extent, shape, strict=True)
    )
    if not inside or (shard.flat and not shard.flat[0] <= shard.flat[1] <= math.prod(extent)):
        raise ValueError(f"a slice of {name} lies outside of it")
    return Stored(file, dtype, shard)


def _numbers(name: str, value: Any) -> tuple[int, ...]:
    # bool is an int to isinstance, and no number here.
    if not isinstance(value, list) or not all(type(n) is int and 0 <= n <= _ELEMENTS for n in value):
        raise ValueError(f"a slice of {name} is cut at {shown(repr(value))}")
    if len(value) > _AXES or math.prod(n or 1 for n in value) > _ELEMENTS:
        raise ValueError(f"{name} is said to be larger than any array")
    return tuple(value)


def _pair(name: str, value: Any) -> tuple[int, int]:
    first, last = _numbers(name, value)
    return first, last


class Reader:
    """Reads pieces from a checkpoint's files; verifies a file's SHA-256 before anything of it is used.

    ``verified``: the hashes have been verified already.
    """

    def __init__(
        self, folder: Path, files: Mapping[str, Any], tensors: Mapping[str, Sequence[Stored]], verified: bool = False
    ) -> None:
        self._folder, self._files, self._tensors, self._verified = folder, files, tensors, verified
        self._opened: dict[str, Any] = {}

    def shard(self, name: str, wanted: Shard) -> np.ndarray:
        """Return ``wanted`` of the tensor ``name``, of shape ``wanted.held``.

        Raises:
            HvdlmError: the stored slices don't cover it, or a file is damaged.
        """
        found = self.covered(name, wanted)
        if found is None:
            raise self._damaged(f"a slice of {name} is missing")
        return found

    def covered(self, name: str, wanted: Shard) -> np.ndarray | None:
        """Return what ``piece`` returns, or None where the stored slices don't cover it."""
        stored = self._tensors[name]
        same = next((s for s in stored if s.shard == wanted), None)
        if same:
            return self._read(name, same)
        # Before memory is taken for what a manifest only claims to be there.
        if sum(math.prod(s.shard.held) for s in stored) < math.prod(stored[0].shard.shape):
            return None
        target = _narrowed(wanted)
        box = np.empty(target.extent, stored[0].numpy)
        lacks = _elements(target)
        for one in stored:
            self._fill(box, lacks, target, name, one)
        if lacks.any():
            return None
        return box if target.flat is None else box.reshape(-1)[slice(*target.flat)].copy()

    def _fill(self, box: np.ndarray, lacks: np.ndarray, target: Shard, name: str, stored: Stored) -> None:
        """Copy into ``box`` what ``stored`` has of it, where it still ``lacks`` something."""
        source = _narrowed(stored.shard)
        common = [
            (max(a, b), min(a + n, b + m))
            for a, n, b, m in zip(target.start, target.extent, source.start, source.extent, strict=True)
        ]
        if any(low >= high for low, high in common):
            return
        # An ellipsis keeps the part of an array without dimensions an array.
        into: tuple[Any, ...] = (
            ...,
            *(slice(low - a, high - a) for (low, high), a in zip(common, target.start, strict=True)),
        )
        out_of: tuple[Any, ...] = (
            ...,
            *(slice(low - a, high - a) for (low, high), a in zip(common, source.start, strict=True)),
        )
        take = lacks[into] & _elements(source)[out_of]
        if not take.any():
            return
        if source.flat is None:
            np.copyto(box[into], self._read(name, stored, out_of[1:]), where=take)
        else:
            values = np.empty(source.extent, box.dtype)
            values.reshape(-1)[slice(*source.flat)] = self._read(name, stored)
            np.copyto(box[into], values[out_of], where=take)
        lacks[into] &= ~take

    def _read(self, name: str, stored: Stored, part: tuple[Any, ...] = ()) -> np.ndarray:
        file = self._open(stored.file)

        def read() -> np.ndarray | None:
            found = file.get_slice(key(name))
            if (found.get_dtype(), tuple(found.get_shape())) != (stored.dtype, stored.shard.held):
                return None
            return found[part] if part else file.get_tensor(key(name))

        array = self._guarded(stored.file, read)
        if array is None:
            raise self._damaged(f"{name} in {stored.file} is not what the manifest says")
        return array

    def all(self, name: str) -> dict[str, np.ndarray]:
        """Return all tensors of a rank's own file, ``exchange/...``; none where the checkpoint has no such file.

        Raises:
            HvdlmError: it is damaged, or holds anything else.
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
            self._opened[name] = self._guarded(name, lambda: self._opened_file(name))
        return self._opened[name]

    def _opened_file(self, name: str) -> Any:
        path = self._folder / name
        # The rules for files are those of the manifest's reader: what lies there now may be another file.
        untrusted_input.size(path, within=self._folder)
        if not self._verified and sha256(path) != self._files[name]["sha256"]:
            raise self._damaged(f"{name} has another SHA-256")
        return open_tensors(path, self._folder)

    def _guarded(self, file: str, action: Callable[[], Any]) -> Any:
        """Return what ``action`` does with ``file``, in which the library may stumble over anything."""
        try:
            return untrusted_input.guarded(action)
        except ValueError as error:
            raise self._damaged(f"{file}: {error}") from error

    def _damaged(self, why: str) -> HvdlmError:
        return HvdlmError(f"checkpoint {self._folder} is damaged: {why}. Resume from another one.")


def _narrowed(shard: Shard) -> Shard:
    """Return the same elements as a piece of the smallest box of whole rows (of the first dimension)."""
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
    """Return bool ``[*extent]``: which elements of its box a piece holds."""
    if shard.flat is None:
        return np.ones(shard.extent, bool)
    mask = np.zeros(shard.extent, bool)
    mask.reshape(-1)[slice(*shard.flat)] = True
    return mask
