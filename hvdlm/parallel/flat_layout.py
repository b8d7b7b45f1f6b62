"""The flat vector in which a framework keeps all parameters, and its division into buckets for communication.

Gradients lie in the order in which the backward pass finishes them (the reverse of the forward pass), so that a bucket
is complete, and can be sent, while earlier layers still compute. The contents of a bucket follow from the description
alone: the same on every rank and in every run, which makes sums reproducible bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hvdlm.models.spec import ParamSpec


@dataclass(frozen=True)
class Shard:
    """The shard of a global array that a rank holds: a box, or a range of the box's elements.

    Attributes:
        shape: the global array's shape.
        start: first index of the box in each dimension.
        extent: size of the box in each dimension.
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
    """Return the shard that is all of an array of ``shape``."""
    return Shard(tuple(shape), (0,) * len(shape), tuple(shape))


@dataclass(frozen=True)
class LocalParam:
    """A parameter's shard on one rank. ``counted``: whether this rank counts it towards the global gradient norm."""

    spec: ParamSpec
    shard: Shard
    counted: bool = True


@dataclass(frozen=True)
class Slot:
    """Elements ``start:stop`` of the flat vector, which hold ``shard`` of one parameter."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    decay: bool
    shard: Shard
    counted: bool = True


Elements = tuple[Slot, int, tuple[int, int]]
"""A slot, the start of some of its elements in a vector, and which of the slot's these are: (first, last exclusive)."""


@dataclass(frozen=True)
class FlatLayout:
    """The slots of all parameters, and the buckets as (first slot, last slot exclusive).

    ``align``: a bucket's number of elements is a multiple of this; its end is padded with zeros.
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

    def zero_ranges(self, rank: int, size: int) -> list[tuple[int, int]]:
        """Return the elements (start, stop) of shard ``rank`` of ``size`` equal shards of every bucket."""
        ranges = []
        for index in range(len(self.buckets)):
            start, stop = self.bucket_range(index)
            length = (stop - start) // size
            ranges.append((start + rank * length, start + (rank + 1) * length))
        return ranges

    def zero_slots(self, rank: int, size: int) -> list[Elements]:
        """Return the slots' elements in the concatenated ``zero_ranges(rank, size)``."""
        overlaps = []
        start = 0
        for (first, last), (a, b) in zip(self.buckets, self.zero_ranges(rank, size), strict=True):
            for slot in self.slots[first:last]:
                low, high = max(a, slot.start), min(b, slot.stop)
                if low < high:
                    overlaps.append((slot, start + low - a, (low - slot.start, high - slot.start)))
            start += b - a
        return overlaps

    def counted_runs(self, rank: int = 0, size: int = 1) -> list[tuple[int, int]]:
        """Return the maximal (start, stop) of counted elements in the concatenated ``zero_ranges(rank, size)``."""
        runs: list[tuple[int, int]] = []
        for slot, start, (low, high) in self.zero_slots(rank, size):
            if slot.counted:
                begin = runs.pop()[0] if runs and runs[-1][1] == start else start
                runs.append((begin, start + high - low))
        return runs

    def decay_mask(self) -> np.ndarray:
        """Return float32 ``[size]``: 1 where weight decay applies."""
        return self.filled(lambda slot: slot.decay)

    def filled(self, value: Callable[[Slot], float]) -> np.ndarray:
        """Return float32 ``[size]``: ``value(slot)`` in every element of a slot, 0 between them."""
        flat = np.zeros(self.size, np.float32)
        for slot in self.slots:
            flat[slot.start : slot.stop] = value(slot)
        return flat

    def flatten(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return float32 ``[size]`` from {name: array}."""
        flat = np.zeros(self.size, np.float32)
        for slot in self.slots:
            flat[slot.start : slot.stop] = arrays[slot.name].reshape(-1)
        return flat

    def unflatten(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        """Return {name: array}, copies of the slots of ``flat`` ``[size]``."""
        return {s.name: flat[s.start : s.stop].reshape(s.shape).copy() for s in self.slots}


def make_layout(
    params: Sequence[ParamSpec | LocalParam],
    bucket_bytes: float,
    align: int = 1,
    alone: Collection[str] = (),
    ends: Collection[str] = (),
) -> FlatLayout:
    """Return the layout of ``params`` (in forward order) in buckets of at least ``bucket_bytes`` but for the last.

    ``alone``: the names of parameters that get a bucket of their own. ``ends``: of those that end one.
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
        if name in alone or name in ends or 4 * (start - slots[first].start) >= bucket_bytes:
            close()
    close()
    return FlatLayout(tuple(slots), tuple(buckets), align)


def _rounded(elements: int, multiple: int) -> int:
    return -(-elements // multiple) * multiple
