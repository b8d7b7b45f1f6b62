"""Which buckets of a layout are sent together."""

from __future__ import annotations

import math

from hvdlm.parallel.flat_layout import FlatLayout

DENSE = "dense"
TOGETHER = {DENSE: 1.0, "dense x4": 4.0, "dense x16": 16.0, "dense whole": math.inf}
"""Lossless methods: buckets of ``communication.bucket_bytes`` times this are sent as one."""


def runs_of(layout: FlatLayout, least: float) -> list[list[int]]:
    """Return the buckets in runs that are sent together: each but the last of at least ``least`` bytes."""
    runs: list[list[int]] = [[]]
    size = 0
    for index in range(len(layout.buckets)):
        if runs[-1] and size >= least:
            runs.append([])
            size = 0
        start, stop = layout.bucket_range(index)
        runs[-1].append(index)
        size += 4 * (stop - start)
    return runs


def merges(layout: FlatLayout, bucket_bytes: int) -> dict[str, list[list[int]]]:
    """Return the lossless methods that differ on this layout, and the buckets that each sends together."""
    methods: dict[str, list[list[int]]] = {}
    for name, factor in TOGETHER.items():
        alone = [[index] for index in range(len(layout.buckets))]
        runs = alone if name == DENSE else runs_of(layout, factor * bucket_bytes)
        if runs not in methods.values():
            methods[name] = runs
    return methods


def elements_of(layout: FlatLayout) -> list[int]:
    """Return the elements of every bucket."""
    ranges = (layout.bucket_range(index) for index in range(len(layout.buckets)))
    return [stop - start for start, stop in ranges]
