"""The elements of a bucket as rows of equal length, one for each rank's shard of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from keras import ops

from hvdlm.parallel.flat_layout import FlatLayout, Slot
from hvdlm.protocols.types import Tensor


class _Run(NamedTuple):
    """Consecutive elements ``start:stop`` of a bucket or of a shard that are sent in the same way."""

    compressed: bool
    start: int
    stop: int


class ShardRows:
    """How the equal shards of a bucket are sent: a row of what is compressed of each, and a row of the rest.

    Shards have different numbers of either, and collectives equal payloads for all: rows are as long as the longest
    one, padded by zeros.

    Attributes:
        width: elements of a row of what is compressed, a multiple of ``multiple``; 0: nothing is.
        rest: elements of a row of what is not compressed.
    """

    def __init__(
        self, layout: FlatLayout, index: int, ranks: int, compressed: Callable[[Slot], bool], multiple: int = 1
    ) -> None:
        begin, end = layout.bucket_range(index)
        first, last = layout.buckets[index]
        self._ranks = ranks
        self._length = (end - begin) // ranks
        self._runs: list[_Run] = []
        for slot in layout.slots[first:last]:
            start, kind = slot.start - begin, compressed(slot)
            if self._runs and self._runs[-1].compressed == kind:
                start = self._runs.pop().start
            self._runs.append(_Run(kind, start, slot.stop - begin))
        self._of_shards = [self._cut(low, low + self._length) for low in range(0, end - begin, self._length)]
        self._counts = {kind: [_count(runs, kind) for runs in self._of_shards] for kind in (True, False)}
        self.width = -(-max(self._counts[True]) // multiple) * multiple
        self.rest = max(self._counts[False])

    def _cut(self, low: int, high: int) -> list[_Run]:
        """Return the runs of elements ``low:high`` of the bucket, counted from ``low``."""
        overlaps = [_Run(kind, max(a, low) - low, min(b, high) - low) for kind, a, b in self._runs]
        return [run for run in overlaps if run.start < run.stop]

    def compressed(self, bucket: Tensor) -> Tensor:
        """Return what is compressed of a bucket ``[elements]`` as one vector."""
        return _joined(bucket, self._runs, True)

    def rows(self, vector: Tensor) -> Tensor:
        """Return what ``compressed`` returned as ``[ranks, width]``."""
        return self._rows(vector, True, self.width)

    def vector(self, rows: Tensor) -> Tensor:
        """Return what ``rows`` was given from ``[ranks, width]``."""
        counts = self._counts[True]
        if min(counts) == self.width:
            return ops.reshape(rows, (-1,))
        return ops.concatenate([rows[rank, :count] for rank, count in enumerate(counts)])

    def rest_rows(self, bucket: Tensor) -> Tensor:
        """Return what is not compressed of a bucket as ``[ranks, rest]``."""
        return self._rows(_joined(bucket, self._runs, False), False, self.rest)

    def _rows(self, vector: Tensor, kind: bool, width: int) -> Tensor:
        counts, chunks, start = self._counts[kind], [], 0
        if min(counts) < width:
            for count in counts:
                chunks.append(_padded(vector[start : start + count], width))
                start += count
            vector = ops.concatenate(chunks)
        return ops.reshape(vector, (self._ranks, width))

    def rows_of_shard(self, shard: Tensor, rank: int) -> tuple[Tensor, Tensor | None]:
        """Return the rows ``[1, width]`` and ``[1, rest]`` of the shard ``[elements / ranks]`` of ``rank``."""
        runs = self._of_shards[rank]
        row = ops.reshape(_padded(_joined(shard, runs, True), self.width), (1, self.width))
        if not self.rest:
            return row, None
        return row, ops.reshape(_padded(_joined(shard, runs, False), self.rest), (1, self.rest))

    def shard(self, row: Tensor, rest: Tensor | None, rank: int) -> Tensor:
        """Return the shard ``[elements / ranks]`` of ``rank`` from its rows ``[width]`` and ``[rest]``."""
        chunks, starts = [], {True: 0, False: 0}
        for run in self._of_shards[rank]:
            start, count = starts[run.compressed], run.stop - run.start
            source = row if run.compressed else rest
            assert source is not None
            chunks.append(source[start : start + count])
            starts[run.compressed] += count
        return _padded(_concatenated(chunks, row), self._length)

    def bucket(self, rows: Tensor, rest: Tensor | None) -> Tensor:
        """Return the bucket ``[elements]`` from all ranks' rows, ``[ranks, width]`` and ``[ranks, rest]``."""
        if min(self._counts[True]) == self._length == self.width:
            return ops.reshape(rows, (-1,))
        shards = (self.shard(rows[n], None if rest is None else rest[n], n) for n in range(self._ranks))
        return ops.concatenate(list(shards))


def _count(runs: Sequence[_Run], kind: bool) -> int:
    return sum(run.stop - run.start for run in runs if run.compressed == kind)


def _joined(source: Tensor, runs: Sequence[_Run], kind: bool) -> Tensor:
    """Return the elements of the runs of one kind as a vector; empty where there are none."""
    chosen = [run for run in runs if run.compressed == kind]
    if len(chosen) == 1 and chosen[0][1:] == (0, source.shape[0]):
        return source
    return _concatenated([source[run.start : run.stop] for run in chosen], source)


def _concatenated(chunks: Sequence[Tensor], like: Tensor) -> Tensor:
    """Return ``chunks`` as one vector, without a copy of a single one; where there are none, an empty one."""
    if len(chunks) < 2:
        return chunks[0] if chunks else like[:0]
    return ops.concatenate(chunks)


def _padded(vector: Tensor, width: int) -> Tensor:
    missing = width - vector.shape[0]
    return ops.pad(vector, [[0, missing]]) if missing else vector
