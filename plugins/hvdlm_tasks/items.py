"""Shuffled batches of items (sentence pairs, recordings, images); the items of a row follow from the seed alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from hvdlm.parallel.mesh import bounds
from hvdlm_language.sampler import permutation_key, permute

_POOL = 64  # batches that are sorted by length together


class ShuffledItems:
    """The order in which ``count`` items are drawn: each once an epoch, shuffled.

    With ``lengths``, items of similar length share a batch: pools of 64 batches are sorted by length, and their batches
    are shuffled.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int, lengths: Sequence[int] | np.ndarray | None = None
    ) -> None:
        self.count = count
        self._batch = batch_size
        self._seed = seed
        self._lengths = None if lengths is None else np.asarray(lengths)
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def rows(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the items of rows ``first:last`` of the global order, int64 ``[n]``.

        And the items of all batches that contain these rows, which must be padded to the same shape.
        """
        begin, end = first // self._batch * self._batch, -(-last // self._batch) * self._batch
        whole = self._items(begin, end)
        return whole[first - begin : last - begin], whole

    def _items(self, start: int, stop: int) -> np.ndarray:
        positions = np.arange(start, stop)
        items = np.empty(len(positions), np.int64)
        for epoch in np.unique(positions // self.count):
            within = positions // self.count == epoch
            items[within] = self._epoch(int(epoch))[positions[within] % self.count]
        return items

    def _draw_epoch(self, epoch: int) -> np.ndarray:
        key = permutation_key(self._seed, epoch)
        order = permute(np.arange(self.count), self.count, key)
        if self._lengths is None:
            return order
        pool = _POOL * self._batch
        return np.concatenate([self._grouped(order[i : i + pool], key) for i in range(0, self.count, pool)])

    def _grouped(self, items: np.ndarray, key: int) -> np.ndarray:
        """Return ``items`` grouped into batches of similar length, the whole batches shuffled."""
        assert self._lengths is not None
        ordered = items[np.argsort(self._lengths[items], kind="stable")]
        whole = len(ordered) // self._batch
        order = permute(np.arange(whole), max(1, whole), key)
        batches = [ordered[i * self._batch : (i + 1) * self._batch] for i in order]
        return np.concatenate([*batches, ordered[whole * self._batch :]])


def spread(targets: np.ndarray, limit: int | None) -> np.ndarray:
    """Return indices of items, evenly spaced, that have about ``limit`` of all ``targets`` ``[items]``; None: all."""
    count, total = len(targets), int(targets.sum())
    chosen = count if limit is None or limit >= total else -(-count * limit // total)
    return np.arange(chosen) * count // chosen


def split_evenly(items: np.ndarray, rank: int, size: int, rows: int) -> Iterator[np.ndarray]:
    """Yield ``rank``'s contiguous part of ``items``, at most ``rows`` at a time."""
    first, last = bounds(len(items), size, rank)
    for start in range(first, last, rows):
        yield items[start : min(start + rows, last)]
