"""Samplers: the tokens of every row of the global order, a function of the seed and the row's number alone."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from hvdlm.data.documents import Documents
from hvdlm.data.token_files import Tokens
from hvdlm.errors import RankError
from hvdlm.parallel.mesh import bounds
from hvdlm_language.document_rows import DocumentRows

_MASK = np.uint64(0xFFFFFFFFFFFFFFFF)
Drawn = TypeVar("Drawn")
_BLOCK = 4096  # rows that are drawn at a time, at most
_DOCUMENT_BLOCK = 256  # of documents, each of which takes about 0.1 ms in a large corpus


def _mix(value: np.ndarray, key: np.uint64) -> np.ndarray:
    """Return a hash, uint64, of each value (the finaliser of splitmix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        z = value + key * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """Return the image of each index under a pseudo-random permutation of ``range(size)`` that ``key`` selects.

    A Feistel network of six rounds on the next even power of two, walked until the value falls below ``size`` (Black
    and Rogaway 2002, section 3). Without a table, memory doesn't grow with the corpus.
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


class TokenBatch(NamedTuple):
    """Rows of tokens; the fields are those of ``Batch``."""

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray | None
    reset: bool
    document_starts: np.ndarray | None = None


class MarkedTokens(NamedTuple):
    """The tokens of a split.

    Attributes:
        tokens: their ids.
        documents: where the documents begin that rows are divided into; None: they are not.
        targets: uint8 for every token, 1 where it is a target; None: all are.
    """

    tokens: Tokens
    documents: Documents | None = None
    targets: Tokens | None = None


class ShuffledSampler:
    """Yields every row of a corpus once an epoch, in random order.

    Rows are windows of ``context + 1`` tokens, shifted in each epoch, or those of ``documents``.
    ``stream``: numbers that make the order of this corpus differ from that of others with the same seed. ``masked``:
    the documents that rows are divided into; ``targets``: see ``MarkedTokens``.
    """

    def __init__(
        self,
        tokens: Tokens,
        context: int,
        batch_size: int,
        seed: int,
        stream: tuple[int, ...] = (),
        documents: DocumentRows | None = None,
        masked: Documents | None = None,
        targets: Tokens | None = None,
    ) -> None:
        self.tokens = tokens
        self.marked = MarkedTokens(tokens, masked, targets)
        self.documents = documents
        self._context = context
        self._seed = seed
        self._stream = stream
        # One window fewer than fit without a shift, so that every shift below the context fits.
        self.windows = max(1, (len(tokens) - 1) // context - 1) if documents is None else len(documents)
        self.epoch_rows = self.windows
        # Drawing an epoch has a fixed cost: a block of a short text has no more epochs than a batch needs.
        block = _BLOCK if documents is None else _DOCUMENT_BLOCK
        self._drawn = _Blocks(min(block, max(batch_size, self.windows)), self._draw)

    def rows(self, first: int, last: int) -> TokenBatch:
        """Return rows ``first:last``, int32 ``[last - first, context]``, and reset: always."""
        spans = [(self.marked, *span) for span in self._drawn.rows(first, last)]
        return _read(spans, self._context, self.documents is not None or self.marked.targets is not None)

    def _draw(self, first: int, last: int) -> list[tuple[int, int]]:
        starts, counts = self.spans(np.arange(first, last))
        return list(zip(starts.tolist(), counts.tolist(), strict=True))

    def spans(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the first token and the number of inputs of the row at each position of the order, int64 ``[n]``."""
        starts, counts = np.empty(len(positions), np.int64), np.full(len(positions), self._context)
        for epoch in np.unique(positions // self.windows):
            chosen = positions // self.windows == epoch
            key = permutation_key(self._seed, int(epoch), *self._stream)
            rows = permute(positions[chosen] % self.windows, self.windows, key)
            if self.documents is not None:
                starts[chosen], counts[chosen] = self.documents.spans(rows)
                continue
            spare = len(self.tokens) - 1 - self.windows * self._context
            offset = key % (min(spare, self._context - 1) + 1)
            starts[chosen] = offset + rows * self._context
        return starts, counts


def permutation_key(*numbers: int) -> int:
    """Return the key of a permutation for these numbers, of which the first is a seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


class _Blocks(Generic[Drawn]):
    """Draws rows in blocks, since the rows of one step are too few for numpy to be fast."""

    def __init__(self, size: int, draw: Callable[[int, int], list[Drawn]]) -> None:
        self._size = size
        self._draw = draw
        self._blocks: dict[int, list[Drawn]] = {}

    def rows(self, first: int, last: int) -> list[Drawn]:
        """Return what is drawn for rows ``first:last`` of the global order."""
        numbers = range(first // self._size, (last - 1) // self._size + 1)
        self._blocks = {
            number: self._blocks.get(number) or self._draw(number * self._size, (number + 1) * self._size)
            for number in numbers
        }
        rows = [row for number in numbers for row in self._blocks[number]]
        before = numbers[0] * self._size
        return rows[first - before : last - before]


class MixtureSampler:
    """Mixes the rows of several corpora by weight; within a corpus, rows come in the order of a ShuffledSampler.

    The first n blocks of rows hold floor(n x block x weight) rows of a corpus, and the largest corpus has the rest: at
    the end of a block no corpus is off by a whole row (the largest by one for each other corpus), however long training
    is. A permutation orders the rows within a block. The corpus of a row, and the position in it, thus follow from the
    row's number without any counting (as in levanter's MixtureDataset).
    """

    def __init__(
        self,
        corpora: Sequence[tuple[Tokens, float]],
        context: int,
        batch_size: int,
        seed: int,
        documents: Sequence[DocumentRows] | None = None,
        masked: Sequence[Documents] | None = None,
        targets: Sequence[Tokens | None] = (),
    ) -> None:
        self._context = context
        self._seed = seed
        self._pads = documents is not None or any(own is not None for own in targets)
        self._samplers = [
            ShuffledSampler(
                tokens,
                context,
                batch_size,
                seed,
                (number,),
                documents[number - 1] if documents else None,
                masked[number - 1] if masked else None,
                targets[number - 1] if targets else None,
            )
            for number, (tokens, _) in enumerate(corpora, 1)
        ]
        weights = [Fraction(weight) for _, weight in corpora]
        self._weights = [weight / sum(weights) for weight in weights]
        self._largest = self._weights.index(max(self._weights))
        # Large enough that the remainder, which the largest corpus has, is never negative.
        self._block = max(1024, len(corpora) ** 2)
        self._drawn = _Blocks(self._block, self._draw)

    @property
    def windows(self) -> list[int]:
        """Rows in an epoch of each corpus."""
        return [sampler.windows for sampler in self._samplers]

    def rows(self, first: int, last: int) -> TokenBatch:
        """Return rows ``first:last``, int32 ``[last - first, context]``, and reset: always."""
        drawn = self._drawn.rows(first, last)
        spans = [(self._samplers[number].marked, start, count) for number, start, count in drawn]
        return _read(spans, self._context, self._pads)

    def counts(self, rows: int) -> np.ndarray:
        """Return each corpus's number of rows in the first ``rows`` rows (whole blocks), int64 ``[corpora]``."""
        counts = [rows * weight.numerator // weight.denominator for weight in self._weights]
        counts[self._largest] += rows - sum(counts)
        return np.array(counts)

    def _draw(self, first: int, last: int) -> list[tuple[int, int, int]]:
        """Return for each row of a block the number of its corpus, its first token and the number of its inputs."""
        before, after = self.counts(first), self.counts(last)
        ends = np.cumsum(after - before)
        order = permute(np.arange(self._block), self._block, permutation_key(self._seed, first, 0, 0))
        corpora = np.searchsorted(ends, order, "right")
        starts, counts = np.empty((2, self._block), np.int64)
        for number, sampler in enumerate(self._samplers):
            chosen = corpora == number
            starts[chosen], counts[chosen] = sampler.spans(after[number] - ends[number] + order[chosen])
        return list(zip(corpora.tolist(), starts.tolist(), counts.tolist(), strict=True))


def _read(spans: Sequence[tuple[MarkedTokens, int, int]], context: int, pads: bool) -> TokenBatch:
    """Return rows, given as (tokens of a corpus, first token, number of inputs).

    ``pads``: some may be shorter than others, or some tokens no targets.
    """
    read = [marked.tokens[start : start + count + 1] for marked, start, count in spans]
    weights = None
    if pads:  # weights in every batch, so that there is one shape of a step
        counts = np.array([count for _, _, count in spans])
        weights = (np.arange(context) < counts[:, None]).astype(np.float32)
        read = [np.pad(ids, (0, context + 1 - len(ids))) for ids in read]
    windows = np.stack(read).astype(np.int32)
    inputs, targets = windows[:, :-1].copy(), windows[:, 1:].copy()
    if weights is not None:
        inputs[weights == 0] = 0  # a row's last target is no input of it
        for row, (marked, start, count) in enumerate(spans):
            if marked.targets is not None:
                weights[row, :count] = marked.targets[start + 1 : start + count + 1]
    starts = None
    if spans[0][0].documents is not None:
        starts = np.stack([_document_starts(marked.documents, first, count, context) for marked, first, count in spans])
    return TokenBatch(inputs, targets, weights, True, starts)


def _document_starts(documents: Documents | None, first: int, count: int, context: int) -> np.ndarray:
    """Return the index of the first token of each input's document, int32 ``[context]``, of the row at ``first``.

    The row has ``count`` inputs, after which padding follows, as a document of its own. A document that begins before
    the row begins at 0.
    """
    assert documents is not None
    numbers = range(len(documents))

    def position(number: int) -> int:
        return int(documents[number : number + 1][0])

    begin = bisect.bisect_right(numbers, first, key=position)
    end = bisect.bisect_left(numbers, first + count, begin, key=position)
    starts = np.zeros(context, np.int32)
    inside = documents[begin:end] - first
    if (np.diff(inside, prepend=0, append=count) < 0).any():
        raise RankError("the index of documents is damaged: prepare the texts again.")
    starts[inside] = inside
    if count < context:
        starts[count] = count
    return np.maximum.accumulate(starts)


class SequentialSampler:
    """Reads the corpus in ``batch_size`` parallel streams, window after window, so that state can be carried over."""

    def __init__(self, tokens: Tokens, context: int, batch_size: int) -> None:
        self._tokens = tokens
        self._context = context
        self._batch_size = batch_size
        self._stream_length = (len(tokens) - 1) // batch_size
        self.windows = self._stream_length // context
        self.epoch_rows = self.windows * batch_size

    def rows(self, first: int, last: int) -> TokenBatch:
        """Return rows ``first:last``, int32 ``[last - first, context]``, which are of one batch.

        ``reset`` says whether the streams start from their beginning with this batch.
        """
        window = first // self._batch_size % self.windows
        starts = (row % self._batch_size * self._stream_length + window * self._context for row in range(first, last))
        spans = [(MarkedTokens(self._tokens), start, self._context) for start in starts]
        return _read(spans, self._context, False)._replace(reset=window == 0)


def document_rows(
    tokens: Tokens,
    documents: DocumentRows,
    context: int,
    rows: int,
    rank: int,
    size: int,
    limit: int | None = None,
    masked: Documents | None = None,
    trained: Tokens | None = None,
) -> Iterator[TokenBatch]:
    """Yield the batches that ``rank`` evaluates of a split in rows of its documents, each row once.

    They have one shape, at most ``rows`` rows; the last one is padded with rows of weight 0. ``limit``: rows with about
    so many targets, spread evenly over the split. ``masked``, ``trained``: of ``MarkedTokens``.
    """
    total = len(documents)
    chosen = total if limit is None else min(total, -(-limit * total // max(1, len(tokens) - 1)))

    def spans(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return documents.spans(positions * total // chosen)

    yield from _evaluated(
        MarkedTokens(tokens, masked, trained), spans, range(*bounds(chosen, size, rank)), context, rows, True
    )


def independent_windows(
    tokens: Tokens,
    context: int,
    rows: int,
    rank: int,
    size: int,
    limit: int | None = None,
    masked: Documents | None = None,
    trained: Tokens | None = None,
) -> Iterator[TokenBatch]:
    """Yield the batches of a split that ``rank`` evaluates, every target of the split predicted exactly once.

    Every rank has a contiguous range of windows, in batches of one shape, of at most ``rows``: for every shape, a graph
    is traced. The last batch, and the last window of the split, are padded, with weight 0. ``limit``: the fewest
    windows with so many targets, spread evenly over the split. ``masked``, ``trained``: of ``MarkedTokens``.
    """
    targets = len(tokens) - 1
    windows = -(-targets // context)
    chosen = windows if limit is None else min(windows, -(-limit // context))
    own = range(*bounds(chosen, size, rank))

    def spans(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        starts = positions * windows // chosen * context
        return starts, np.minimum(context, targets - starts)

    short = bool(own) and spans(np.array(own[-1:]))[1][0] < context
    yield from _evaluated(MarkedTokens(tokens, masked, trained), spans, own, context, rows, short)


def _evaluated(
    marked: MarkedTokens,
    spans: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    own: range,
    context: int,
    rows: int,
    pads: bool,
) -> Iterator[TokenBatch]:
    """Yield the rows of positions ``own`` in batches of one shape, of at most ``rows``; the last one is padded.

    ``spans`` returns the first tokens and the numbers of inputs of the rows at some positions. ``pads``: some have
    fewer than others.
    """
    if not own:
        return
    batches = -(-len(own) // rows)
    rows = -(-len(own) // batches)
    pads = pads or marked.targets is not None or batches * rows > len(own)
    for start in range(0, len(own), rows):
        starts, counts = spans(np.array(own[start : start + rows]))
        read = [(marked, *span) for span in zip(starts.tolist(), counts.tolist(), strict=True)]
        yield _read(read + [(marked, 0, 0)] * (rows - len(read)), context, pads)


def parallel_streams(
    tokens: Tokens, context: int, streams: int, rank: int, size: int, limit: int | None = None
) -> Iterator[TokenBatch]:
    """Yield the batches that ``rank`` evaluates of a split read in ``streams`` parallel streams with carried state.

    They have one shape, at most ``context`` wide; shorter streams are padded, with weight 0. ``limit``: the beginnings
    of the streams, with so many targets or one of each stream more.
    """
    streams = max(1, min(streams, (len(tokens) - 1) // 2))
    first, last = bounds(streams, size, rank)
    if first == last:
        return
    edges = np.arange(streams + 1) * (len(tokens) - 1) // streams
    lengths = edges[1:] - edges[:-1]
    if limit is not None:
        lengths = np.minimum(lengths, -(-limit // streams))
    longest = int(lengths.max())
    batches = -(-longest // context)
    width = -(-longest // batches)
    complete = lengths[first:last].min() == batches * width
    for start in range(0, longest, width):
        inputs = np.zeros((last - first, width), np.int32)
        targets, weights = np.zeros_like(inputs), np.zeros((last - first, width), np.float32)
        for row, stream in enumerate(range(first, last)):
            begin = edges[stream] + start
            count = max(0, min(width, lengths[stream] - start))
            inputs[row, :count] = tokens[begin : begin + count]
            targets[row, :count] = tokens[begin + 1 : begin + 1 + count]
            weights[row, :count] = 1
        yield TokenBatch(inputs, targets, None if complete else weights, start == 0)
