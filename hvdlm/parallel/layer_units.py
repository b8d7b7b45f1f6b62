"""Layers whose parameters are gathered, used and freed together (ZeRO-3), and the flat layout that they need.

As in FSDP (Zhao et al. 2023, section 3.2), a model is a sequence of units: the embedding, every layer, and the head
with the norm before it. A unit's shard on a rank is one range of the vector that the rank updates, so that one
all-gather brings all of it; its gradients are scattered matrix by matrix, straight from the memory in which they were
computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hvdlm.parallel.flat_layout import FlatLayout, LocalParam, make_layout

_OWN_BUCKET = 16
"""A parameter of at least this fraction of its unit is a bucket of its own; smaller ones share one."""

EMBEDDING, HEAD = "embed", "head"


@dataclass(frozen=True)
class Unit:
    """A layer's range of the flat layout.

    Attributes:
        name: ``embed``, ``layers.N`` or ``head``.
        buckets: its buckets (first, last exclusive).
        elements: of the flat vector (start, stop).
    """

    name: str
    buckets: tuple[int, int]
    elements: tuple[int, int]

    @property
    def size(self) -> int:
        """Elements, with the zeros between buckets."""
        return self.elements[1] - self.elements[0]


def unit_of(name: str) -> str:
    """Return the name of the unit of parameter ``name``."""
    first, *rest = name.split(".")
    if first == "layers":
        return f"{first}.{rest[0]}"
    return EMBEDDING if first == "embed" else HEAD


def make_unit_layout(params: Sequence[LocalParam], align: int) -> FlatLayout:
    """Return the layout whose buckets are those of units, of ``params`` in forward order."""
    units: dict[str, list[LocalParam]] = {}
    for param in params:
        units.setdefault(unit_of(param.spec.name), []).append(param)
    ordered: list[LocalParam] = []
    alone: list[str] = []
    for members in units.values():
        smallest = sum(_size(param) for param in members) / _OWN_BUCKET
        large = [param for param in members if _size(param) >= smallest]
        # In the backward pass, the other way round: the small ones, whose bucket waits for a layer's first norm, last.
        ordered += [param for param in members if _size(param) < smallest] + large
        alone += [param.spec.name for param in large]
    ends = {unit_of(param.spec.name): param.spec.name for param in reversed(ordered)}
    return make_layout(ordered, float("inf"), align, alone, ends.values())


def units_of(layout: FlatLayout) -> list[Unit]:
    """Return the units of a layout, in the order of the forward pass."""
    names = [unit_of(layout.slots[first].name) for first, _ in layout.buckets]
    units = []
    for name in dict.fromkeys(names):
        first, last = names.index(name), len(names) - names[::-1].index(name)
        elements = layout.bucket_range(first)[0], layout.bucket_range(last - 1)[1]
        units.append(Unit(name, (first, last), elements))
    return units[::-1]


def _size(param: LocalParam) -> int:
    return math.prod(param.shard.extent)
