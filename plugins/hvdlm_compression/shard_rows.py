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
    """Which elements of a bucket are compressed: a row of each of its equal shards, and a vector of the rest.

    Shards have different numbers of compressed elements, and collectives equal payloads for all ranks: rows are as long
    as the longest one, padded by zeros. The rest, in the order of the shards, is not: many small tensors may lie in one
    shard of many.

    Attributes:
        width: elements of a row, a multiple of ``multiple``; 0: nothing is compressed.
        rest: elements of each shard that are not compressed.
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
        self._counts = [_count(runs, True) for runs in self._of_shards]
        self.rest = [_count(runs, False) for runs in self._of_shards]
        self.width = -(-max(self._counts) // multiple) * multiple

    def _cut(self, low: int, high: int) -> list[_Run]:
        """Return the runs of elements ``low:high`` of the bucket, counted from ``low``."""
        overlaps = [_Run(kind, max(a, low) - low, min(b, high) - low) for kind, a, b in self._runs]
        return [run for run in overlaps if run.start < run.stop]

    def split(self, bucket: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is compressed of a bucket ``[elements]``, and the rest, as two vectors."""
        return _joined(bucket, self._runs, True), _joined(bucket, self._runs, False)

    def rows(self, vector: Tensor) -> Tensor:
        """Return what is compressed, as ``split`` returned it, as ``[ranks, width]``."""
        if min(self._counts) < self.width:
            chunks, start = [], 0
            for count in self._counts:
                chunks.append(_padded(vector[start : start + count], self.width))
                start += count
            vector = ops.concatenate(chunks)
        return ops.reshape(vector, (self._ranks, self.width))

    def vector(self, rows: Tensor) -> Tensor:
        """Return what ``rows`` was given from ``[ranks, width]``."""
        if min(self._counts) == self.width:
            return ops.reshape(rows, (-1,))
        return ops.concatenate([rows[rank, :count] for rank, count in enumerate(self._counts)])

    def split_shard(self, shard: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Return the row ``[1, width]`` and the rest of the shard ``[elements / ranks]`` of ``rank``."""
        runs = self._of_shards[rank]
        row = _padded(_joined(shard, runs, True), self.width)
        return ops.reshape(row, (1, self.width)), _joined(shard, runs, False)

    def shard(self, row: Tensor, rest: Tensor | None, rank: int) -> Tensor:
        """Return the shard ``[elements / ranks]`` of ``rank`` from its row ``[width]`` and the rest of all shards."""
        chunks, starts = [], {True: 0, False: sum(self.rest[:rank])}
        for run in self._of_shards[rank]:
            start, count = starts[run.compressed], run.stop - run.start
            source = row if run.compressed else rest
            assert source is not None
            chunks.append(source[start : start + count])
            starts[run.compressed] += count
        return _padded(_concatenated(chunks, row), self._length)

    def bucket(self, rows: Tensor, rest: Tensor | None) -> Tensor:
        """Return the bucket ``[elements]`` from all ranks' rows ``[ranks, width]`` and the rest of all shards."""
        if min(self._counts) == self._length == self.width:
            return ops.reshape(rows, (-1,))
        return ops.concatenate([self.shard(rows[rank], rest, rank) for rank in range(self._ranks)])


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
