"""The flat vector in which a framework keeps all parameters, and its cut into buckets for communication.

Gradients lie in the order in which the backward pass finishes them (the reverse of the forward pass), so that a bucket
is complete, and can travel, while earlier layers still compute. What a bucket holds follows from the description
alone: the same on every rank and in every run, which makes sums reproducible bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hvdlm.models.spec import ParamSpec


@dataclass(frozen=True)
class Slot:
    """One parameter's place: elements ``start:stop`` of the flat vector."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    decay: bool


@dataclass(frozen=True)
class FlatLayout:
    """Every parameter's place, and the buckets as (first slot, last slot exclusive)."""

    slots: tuple[Slot, ...]
    buckets: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        """Elements of the flat vector."""
        return self.slots[-1].stop

    def bucket_range(self, index: int) -> tuple[int, int]:
        """Return the elements (start, stop) of bucket ``index``."""
        first, last = self.buckets[index]
        return self.slots[first].start, self.slots[last - 1].stop

    def decay_mask(self) -> np.ndarray:
        """Return float32 ``[size]``: 1 where weight decay applies."""
        mask = np.zeros(self.size, np.float32)
        for slot in self.slots:
            mask[slot.start : slot.stop] = slot.decay
        return mask

    def flatten(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return float32 ``[size]`` from {name: array}."""
        flat = np.empty(self.size, np.float32)
        for slot in self.slots:
            flat[slot.start : slot.stop] = arrays[slot.name].reshape(-1)
        return flat

    def unflatten(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        """Return {name: array} as copies of the parts of ``flat`` ``[size]``."""
        return {s.name: flat[s.start : s.stop].reshape(s.shape).copy() for s in self.slots}


def make_layout(params: Sequence[ParamSpec], bucket_bytes: int) -> FlatLayout:
    """Return the layout of ``params`` (in forward order) in buckets of at least ``bucket_bytes`` but for the last."""
    slots: list[Slot] = []
    buckets: list[tuple[int, int]] = []
    start = first = 0
    for param in reversed(params):
        slots.append(Slot(param.name, param.shape, start, start + param.size, param.decay))
        start += param.size
        if 4 * (start - slots[first].start) >= bucket_bytes:
            buckets.append((first, len(slots)))
            first = len(slots)
    if first < len(slots):
        buckets.append((first, len(slots)))
    return FlatLayout(tuple(slots), tuple(buckets))
