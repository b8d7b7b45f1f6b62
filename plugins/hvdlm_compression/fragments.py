"""Fragments of a flat vector: consecutive ranges of about equal size, which synchronise in turn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

from hvdlm.parallel.flat_layout import FlatLayout, Slot


def cut_into_fragments(layout: FlatLayout, count: int) -> tuple[FlatLayout, tuple[int, ...]]:
    """Return the layout whose buckets are the fragments of ``layout``, and the number, below ``count``, of each.

    Parameters are cut between their rows (entries of the first axis), at the same fractions of the global array on
    every rank: what several tensor ranks hold alike belongs to the same fragment on all of them. A number whose rows
    are all in its neighbours has no fragment.
    """
    sizes = [math.prod(slot.shard.shape) for slot in layout.slots]
    total, before = sum(sizes), 0
    slots: list[Slot] = []
    firsts: dict[int, int] = {}  # by number, the index of the fragment's first slot
    for slot, size in zip(layout.slots, sizes, strict=True):
        for number, rows in _rows(slot, size, before, total, count):
            firsts.setdefault(number, len(slots))
            slots.append(_cut(slot, *rows))
        before += size
    ends = [*firsts.values(), len(slots)]
    buckets = tuple(itertools.pairwise(ends))
    return FlatLayout(tuple(slots), buckets), tuple(firsts)


def _rows(slot: Slot, size: int, before: int, total: int, count: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yield the numbers of the fragments that ``slot`` has rows of, and those rows (first, last exclusive).

    ``size``: elements of the global array; ``before``: those of the slots before it, of ``total`` in all slots.
    """
    rows = slot.shape[0] if slot.shape else 1
    number, first = before * count // total, 0
    while first < rows:
        # The element at which the fragment ends is (number + 1) * total / count.
        last = min(rows, rows * ((number + 1) * total - before * count) // (size * count))
        if last > first:
            yield number, (first, last)
            first = last
        number += 1


def _cut(slot: Slot, first: int, last: int) -> Slot:
    """Return the slot of rows ``first:last`` of ``slot``."""
    rows = slot.shape[0] if slot.shape else 1
    if (first, last) == (0, rows):
        return slot
    width = (slot.stop - slot.start) // rows
    start, stop = slot.start + first * width, slot.start + last * width
    name = f"{slot.name}[{first}:{last}]"
    return replace(slot, name=name, shape=(last - first, *slot.shape[1:]), start=start, stop=stop)
