"""The flat vector in which a framework keeps all parameters, and its cut into buckets for communication.

Gradients lie in the order in which the backward pass finishes them (the reverse of the forward pass), so that a bucket
is complete, and can travel, while earlier layers still compute. What a bucket holds follows from the description
alone: the same on every rank and in every run, which makes sums reproducible bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hvdlm.models.spec import ParamSpec


@dataclass(frozen=True)
class Shard:
    """Which part of a global array a rank holds: a box, and of a box perhaps only some elements.

    Attributes:
        shape: the global array's shape.
        start: where the box begins in each dimension.
        extent: how far it reaches in each dimension.
        flat: (first, last exclusive) element of the box in row-major order; None: all. The rank's array is the
            box's ``[*extent]``, or ``[last - first]`` of its elements.
    """

    shape: tuple[int, ...]
    start: tuple[int, ...]
    extent: tuple[int, ...]
    flat: tuple[int, int] | None = None

    @property
    def slices(self) -> tuple[slice, ...]:
        """The box as an index of the global array."""
        return tuple(slice(a, a + n) for a, n in zip(self.start, self.extent, strict=True))

    @property
    def held(self) -> tuple[int, ...]:
        """The shape of the rank's array."""
        return self.extent if self.flat is None else (self.flat[1] - self.flat[0],)


def whole(shape: tuple[int, ...]) -> Shard:
    """Return all of an array of ``shape``."""
    return Shard(tuple(shape), (0,) * len(shape), tuple(shape))


@dataclass(frozen=True)
class LocalParam:
    """A parameter as one rank holds it. ``counted``: whether this rank counts it where each element counts once."""

    spec: ParamSpec
    shard: Shard
    counted: bool = True


@dataclass(frozen=True)
class Slot:
    """One parameter's place: elements ``start:stop`` of the flat vector hold ``piece`` of it."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    decay: bool
    shard: Shard
    counted: bool = True


@dataclass(frozen=True)
class FlatLayout:
    """Every parameter's place, and the buckets as (first slot, last slot exclusive).

    ``align``: a bucket's elements are a multiple of this; zeros that belong to no slot fill its end.
    """

    slots: tuple[Slot, ...]
    buckets: tuple[tuple[int, int], ...]
    align: int = 1

    @property
    def size(self) -> int:
        """Elements of the flat vector."""
        return self.bucket_range(len(self.buckets) - 1)[1]

    def bucket_range(self, index: int) -> tuple[int, int]:
        """Return the elements (start, stop) of bucket ``index``."""
        first, last = self.buckets[index]
        return self.slots[first].start, _rounded(self.slots[last - 1].stop, self.align)

    def parts(self, place: int, size: int) -> list[tuple[int, int]]:
        """Return the elements (start, stop) of part ``place`` of ``size`` equal parts of every bucket."""
        found = []
        for index in range(len(self.buckets)):
            start, stop = self.bucket_range(index)
            model_shard = (stop - start) // size
            found.append((start + place * model_shard, start + (place + 1) * model_shard))
        return found

    def held(self, place: int, size: int) -> list[tuple[Slot, int, tuple[int, int]]]:
        """Return what lies in ``parts(place, size)``, laid end to end.

        Each is (slot, where its elements begin there, which (first, last exclusive) of its elements they are).
        """
        found = []
        start = 0
        for (first, last), (a, b) in zip(self.buckets, self.parts(place, size), strict=True):
            for slot in self.slots[first:last]:
                low, high = max(a, slot.start), min(b, slot.stop)
                if low < high:
                    found.append((slot, start + low - a, (low - slot.start, high - slot.start)))
            start += b - a
        return found

    def counted_runs(self, place: int = 0, size: int = 1) -> list[tuple[int, int]]:
        """Return the longest (start, stop) of counted elements in ``parts(place, size)``, laid end to end."""
        runs: list[tuple[int, int]] = []
        for slot, start, (low, high) in self.held(place, size):
            if slot.counted:
                begin = runs.pop()[0] if runs and runs[-1][1] == start else start
                runs.append((begin, start + high - low))
        return runs

    def decay_mask(self) -> np.ndarray:
        """Return float32 ``[size]``: 1 where weight decay applies."""
        mask = np.zeros(self.size, np.float32)
        for slot in self.slots:
            mask[slot.start : slot.stop] = slot.decay
        return mask

    def flatten(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return float32 ``[size]`` from {name: array}."""
        flat = np.zeros(self.size, np.float32)
        for slot in self.slots:
            flat[slot.start : slot.stop] = arrays[slot.name].reshape(-1)
        return flat

    def unflatten(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        """Return {name: array} as copies of the parts of ``flat`` ``[size]``."""
        return {s.name: flat[s.start : s.stop].reshape(s.shape).copy() for s in self.slots}


def make_layout(
    params: Sequence[ParamSpec | LocalParam], bucket_bytes: int, align: int = 1, alone: Collection[str] = ()
) -> FlatLayout:
    """Return the layout of ``params`` (in forward order) in buckets of at least ``bucket_bytes`` but for the last.

    ``alone``: the names of parameters that fill a bucket of their own.
    """
    slots: list[Slot] = []
    buckets: list[tuple[int, int]] = []
    start = first = 0

    def close() -> None:
        nonlocal start, first
        if first < len(slots):
            buckets.append((first, len(slots)))
            start, first = _rounded(start, align), len(slots)

    for param in reversed(params):
        local = param if isinstance(param, LocalParam) else LocalParam(param, whole(param.shape))
        name, shape = local.spec.name, local.shard.extent
        if name in alone:
            close()
        stop = start + math.prod(shape)
        slots.append(Slot(name, shape, start, stop, local.spec.decay, local.shard, local.counted))
        start = stop
        if name in alone or 4 * (start - slots[first].start) >= bucket_bytes:
            close()
    close()
    return FlatLayout(tuple(slots), tuple(buckets), align)


def _rounded(elements: int, multiple: int) -> int:
    return -(-elements // multiple) * multiple
