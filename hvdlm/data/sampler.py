"""Which tokens make the global batch of a step: a function of seed and step alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Generic, TypeVar

import numpy as np

from hvdlm.parallel.mesh import bounds

_MASK = np.uint64(0xFFFFFFFFFFFFFFFF)
Drawn = TypeVar("Drawn")
_BLOCK = 4096  # rows whose places are drawn at a time, at most


def _mix(value: np.ndarray, key: np.uint64) -> np.ndarray:
    """Return a well-mixed uint64 of each value (the finaliser of splitmix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        z = value + key * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """Return where a pseudo-random permutation of ``range(size)``, chosen by ``key``, sends each index.

    A Feistel network of six rounds on the next even power of two, walked until the value falls below ``size`` (Black
    and Rogaway 2002, section 3): no table, so memory doesn't grow with the corpus.
    """
    half = np.uint64(max(1, (max(1, size - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    value = np.asarray(index, np.uint64).copy()
    pending = np.arange(len(value))
    while len(pending):
        left, right = value[pending] >> half, value[pending] & low
        for number in range(6):
            round_key = np.uint64((key * 6 + number + 1) & int(_MASK))
            left, right = right, left ^ (_mix(right, round_key) & low)
        value[pending] = (left << half) | right
        pending = pending[value[pending] >= size]
    return value.astype(np.int64)


class ShuffledSampler:
    """Every window of ``context + 1`` tokens once an epoch, in random order, each epoch cut at another offset.

    ``stream``: numbers that tell corpora apart which are shuffled with the same seed.
    """

    def __init__(
        self, tokens: np.ndarray, context: int, batch_size: int, seed: int, stream: tuple[int, ...] = ()
    ) -> None:
        self.tokens = np.asarray(tokens)  # slices of a memmap cost more than those of a plain array over it
        self._context, self._batch, self._seed, self._stream = context, batch_size, seed, stream
        # One window less than fit without an offset, so that every offset below the context fits.
        self.windows = max(1, (len(tokens) - 1) // context - 1)
        # An epoch costs a fixed time to draw: of a short text no more epochs than a batch needs.
        self._dealt = _Blocks(min(_BLOCK, max(batch_size, self.windows)), self._draw)

    def rows(self, step: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray, bool]:
        """Return int32 inputs and targets ``[last - first, context]`` of the rows of ``step``, and reset: always."""
        starts = self._dealt.rows(step * self._batch + first, step * self._batch + last)
        return _windows(((self.tokens, start) for start in starts), self._context) + (True,)

    def _draw(self, first: int, last: int) -> list[int]:
        return self.starts(np.arange(first, last)).tolist()

    def starts(self, place: np.ndarray) -> np.ndarray:
        """Return where the windows begin that come at these places of the order, int64 ``[n]``."""
        starts = np.empty(len(place), np.int64)
        for epoch in np.unique(place // self.windows):
            chosen = place // self.windows == epoch
            key = permutation_key(self._seed, int(epoch), *self._stream)
            spare = len(self.tokens) - 1 - self.windows * self._context
            offset = key % (min(spare, self._context - 1) + 1)
            starts[chosen] = offset + permute(place[chosen] % self.windows, self.windows, key) * self._context
        return starts


def permutation_key(*numbers: int) -> int:
    """Return the key of a permutation of its own for these numbers, a seed first."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


class _Blocks(Generic[Drawn]):
    """Rows are drawn many at once, since a step alone has too few for numpy."""

    def __init__(self, size: int, draw: Callable[[int, int], list[Drawn]]) -> None:
        self._size, self._draw = size, draw
        self._known: dict[int, list[Drawn]] = {}

    def rows(self, first: int, last: int) -> list[Drawn]:
        """Return what is drawn for rows ``first:last`` of the whole order."""
        blocks = range(first // self._size, (last - 1) // self._size + 1)
        self._known = {
            block: self._known.get(block) or self._draw(block * self._size, (block + 1) * self._size)
            for block in blocks
        }
        known = [drawn for block in blocks for drawn in self._known[block]]
        skipped = blocks[0] * self._size
        return known[first - skipped : last - skipped]


class MixtureSampler:
    """Rows of several corpora, each with its share of them; within a corpus, windows come as of a ShuffledSampler.

    The first n blocks of rows hold floor(n x block x share) rows of a corpus, the rest is the largest corpus', so that
    no share is off by a whole row at a block's end (the largest by one for each other corpus), however long training
    is. A permutation deals them out within a block. Like this, the corpus of a row and the place in it follow from the
    row's number (as in levanter's MixtureDataset): nothing has to be counted.
    """

    def __init__(self, corpora: Sequence[tuple[np.ndarray, float]], context: int, batch_size: int, seed: int) -> None:
        self._context, self._batch, self._seed = context, batch_size, seed
        self._parts = [
            ShuffledSampler(tokens, context, batch_size, seed, (number,))
            for number, (tokens, _) in enumerate(corpora, 1)
        ]
        shares = [Fraction(share) for _, share in corpora]
        self._shares = [share / sum(shares) for share in shares]
        self._largest = self._shares.index(max(self._shares))
        # So many rows that the largest corpus, which has what others leave, gets no fewer than none.
        self._block = max(1024, len(corpora) ** 2)
        self._dealt = _Blocks(self._block, self._draw)

    @property
    def windows(self) -> list[int]:
        """Windows in an epoch of each corpus."""
        return [part.windows for part in self._parts]

    def rows(self, step: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray, bool]:
        """Return int32 inputs and targets ``[last - first, context]`` of the rows of ``step``, and reset: always."""
        drawn = self._dealt.rows(step * self._batch + first, step * self._batch + last)
        return _windows(((self._parts[part].tokens, start) for part, start in drawn), self._context) + (True,)

    def counts(self, rows: int) -> np.ndarray:
        """Return how many of the first ``rows`` rows, whole blocks of them, are of each corpus, int64 ``[corpora]``."""
        counts = [rows * share.numerator // share.denominator for share in self._shares]
        counts[self._largest] += rows - sum(counts)
        return np.array(counts)

    def _draw(self, first: int, last: int) -> list[tuple[int, int]]:
        """Return for each row of a block the number of its corpus and where its window begins."""
        before, after = self.counts(first), self.counts(last)
        ends = np.cumsum(after - before)
        places = permute(np.arange(self._block), self._block, permutation_key(self._seed, first, 0, 0))
        parts, starts = np.searchsorted(ends, places, "right"), np.empty(self._block, np.int64)
        for number, part in enumerate(self._parts):
            chosen = parts == number
            starts[chosen] = part.starts(after[number] - ends[number] + places[chosen])
        return list(zip(parts.tolist(), starts.tolist(), strict=True))


def _windows(places: Iterable[tuple[np.ndarray, int]], context: int) -> tuple[np.ndarray, np.ndarray]:
    """Return int32 inputs and targets ``[rows, context]`` of the windows that begin at these places of some tokens."""
    windows = np.stack([tokens[start : start + context + 1] for tokens, start in places]).astype(np.int32)
    return np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])


class SequentialSampler:
    """Row b reads the b-th part of the corpus window after window, so that recurrent state can be carried."""

    def __init__(self, tokens: np.ndarray, context: int, batch_size: int) -> None:
        self._tokens, self._context = np.asarray(tokens), context
        self._part = (len(tokens) - 1) // batch_size
        self.windows = self._part // context

    def rows(self, step: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray, bool]:
        """Return int32 inputs and targets ``[last - first, context]``, and whether a new pass begins."""
        window = step % self.windows
        starts = (row * self._part + window * self._context for row in range(first, last))
        return _windows(((self._tokens, start) for start in starts), self._context) + (window == 0,)


Piece = tuple[np.ndarray, np.ndarray, np.ndarray | None, bool]


def independent_windows(tokens: np.ndarray, context: int, rows: int, rank: int, size: int) -> Iterator[Piece]:
    """Yield ``rank``'s share of a split: (inputs, targets, weights, reset), every target predicted exactly once.

    Windows are dealt out in contiguous shares; the last window of the split is padded, its padding weighs 0.
    """
    targets = len(tokens) - 1
    windows = -(-targets // context)
    first, last = bounds(windows, size, rank)
    for start in range(first, last, rows):
        stop = min(start + rows, last)
        part = np.asarray(tokens[start * context : min(stop * context, targets) + 1], np.int32)
        missing = (stop - start) * context + 1 - len(part)
        padded = np.concatenate([part, np.zeros(missing, np.int32)])
        counted = np.ones((stop - start) * context, np.float32)
        counted[counted.size - missing :] = 0
        weights = counted.reshape(-1, context) if missing else None
        yield padded[:-1].reshape(-1, context), padded[1:].reshape(-1, context), weights, True


def parallel_streams(tokens: np.ndarray, context: int, streams: int, rank: int, size: int) -> Iterator[Piece]:
    """Yield ``rank``'s share of a split read as ``streams`` parallel streams with carried state; targets once each."""
    streams = max(1, min(streams, (len(tokens) - 1) // 2))
    first, last = bounds(streams, size, rank)
    if first == last:
        return
    edges = np.arange(streams + 1) * (len(tokens) - 1) // streams
    longest = int((edges[1:] - edges[:-1]).max())
    for start in range(0, longest, context):
        width = min(context, longest - start)
        inputs = np.zeros((last - first, width), np.int32)
        targets, weights = np.zeros_like(inputs), np.zeros((last - first, width), np.float32)
        for row, stream in enumerate(range(first, last)):
            begin = edges[stream] + start
            count = max(0, min(width, edges[stream + 1] - begin))
            inputs[row, :count] = tokens[begin : begin + count]
            targets[row, :count] = tokens[begin + 1 : begin + 1 + count]
            weights[row, :count] = 1
        yield inputs, targets, (None if weights.all() else weights), start == 0
