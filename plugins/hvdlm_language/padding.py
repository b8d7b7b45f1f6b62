"""Rows of different lengths in one array."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pad_rows(rows: Sequence[np.ndarray], time: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ``rows`` of ids padded with zeros, int32 ``[rows, time]``, and float32 weights: 1 where there is an id."""
    ids = np.zeros((len(rows), time), np.int32)
    weights = np.zeros((len(rows), time), np.float32)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        weights[index, : len(row)] = 1
    return ids, weights


def round_up(length: int, multiple: int) -> int:
    """Return the next multiple, at least one: few different shapes, since frameworks build a graph for each."""
    return max(1, -(-length // multiple)) * multiple
