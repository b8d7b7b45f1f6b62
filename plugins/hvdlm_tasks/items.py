"""Which items (pairs of sentences, recordings, images) make the rows of a batch: a function of seed and row alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from hvdlm.data.sampler import permutation_key, permute
from hvdlm.parallel.mesh import bounds

_POOL = 64  # batches among which items of like length are put together


class ShuffledItems:
    """Every one of ``count`` items once an epoch, in random order.

    With ``lengths``, items of like length share a batch: 64 batches at a time are sorted, and come in random order.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int, lengths: Sequence[int] | np.ndarray | None = None
    ) -> None:
        self._count, self._batch, self._seed = count, batch_size, seed
        self._lengths = None if lengths is None else np.asarray(lengths)
        self._epoch = lru_cache(maxsize=2)(self._draw)

    def rows(self, number: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the items of rows ``first:last`` of batch ``number``, which count on into the next, int64 ``[n]``.

        And those of all batches that they are in, over which the rows have to have the same shape.
        """
        begin, end = first // self._batch * self._batch, -(-last // self._batch) * self._batch
        whole = self._items(number * self._batch + begin, number * self._batch + end)
        return whole[first - begin : last - begin], whole

    def _items(self, start: int, stop: int) -> np.ndarray:
        places = np.arange(start, stop)
        found = np.empty(len(places), np.int64)
        for epoch in np.unique(places // self._count):
            chosen = places // self._count == epoch
            found[chosen] = self._epoch(int(epoch))[places[chosen] % self._count]
        return found

    def _draw(self, epoch: int) -> np.ndarray:
        key = permutation_key(self._seed, epoch)
        order = permute(np.arange(self._count), self._count, key)
        if self._lengths is None:
            return order
        pool = _POOL * self._batch
        return np.concatenate([self._grouped(order[i : i + pool], key) for i in range(0, self._count, pool)])

    def _grouped(self, items: np.ndarray, key: int) -> np.ndarray:
        """Return ``items`` so that those of like length stand together, whole batches in random order."""
        assert self._lengths is not None
        ordered = items[np.argsort(self._lengths[items], kind="stable")]
        whole = len(ordered) // self._batch
        order = permute(np.arange(whole), max(1, whole), key)
        batches = [ordered[i * self._batch : (i + 1) * self._batch] for i in order]
        return np.concatenate([*batches, ordered[whole * self._batch :]])


def dealt(items: np.ndarray, rank: int, size: int, rows: int) -> Iterator[np.ndarray]:
    """Yield ``rank``'s contiguous share of ``items``, ``rows`` at a time."""
    first, last = bounds(len(items), size, rank)
    for start in range(first, last, rows):
        yield items[start : min(start + rows, last)]


def up_to(value: int, multiple: int) -> int:
    """Return the next multiple: few different shapes, since frameworks make a graph for each."""
    return max(1, -(-value // multiple)) * multiple
