"""Rows that begin where documents begin: whole documents, as many as fit, or a part of a longer one.

A row is a range of the corpus. It begins at a document, or where the row before stopped inside of one, and ends before
the last document that begins at most ``context`` tokens later, or after ``context`` tokens where none does. Rows thus
cover the corpus: every token but the last is an input of one row, with the token after it as the target.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from hvdlm.data.documents import Documents
from hvdlm.errors import HvdlmError

# Documents whose rows are laid out by themselves, so that those of one block can be found without those before: a row
# ends at the end of a block. The mean of half a row that this leaves empty is 2% of the rows of documents of 50 tokens
# with a context of 1024, and less for longer documents.
_BLOCK = 512
_BLOCKS = 512  # that are laid out at once when a corpus is opened
_CACHED = 64  # blocks of which the layout is kept


class _Layout(NamedTuple):
    """The rows of a block. A run is a document that a row begins with, and those that follow it in its last row.

    Attributes:
        rows: rows up to the end of each run, int64 ``[runs]``.
        starts: first token of each run.
        ends: the token after it.
    """

    rows: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


class DocumentRows:
    """The rows of a split of ``tokens`` tokens.

    The index is read once when it is opened, in blocks; only the number of rows of each block is kept.

    Attributes:
        longer: the number of documents that are longer than a row.

    Raises:
        HvdlmError: the index is damaged.
    """

    def __init__(self, documents: Documents, tokens: int, context: int) -> None:
        self._documents = documents
        self._context = context
        self._edge = max(0, tokens - 1)  # the last token is no input
        self.longer = 0
        counts = [0]
        for first in range(0, len(documents), _BLOCK * _BLOCKS):
            last = min(first + _BLOCK * _BLOCKS, len(documents))
            bounds = self._bounds(first, last)
            if (np.diff(bounds) < 0).any() or bounds[0] < 0 or (first == 0 and bounds[0] != 0):
                raise HvdlmError("its index of documents is damaged: prepare it again, or use --data.rows windows.")
            self.longer += int((np.diff(bounds) > context).sum())
            counts += _count_rows(bounds, context)
        self._before = np.cumsum(counts)
        self._layout = functools.lru_cache(_CACHED)(functools.partial(_layout_of, self._bounds, context))

    def __len__(self) -> int:
        return int(self._before[-1])

    def spans(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the first token and the number of inputs of each row, int64 ``[n]``."""
        starts, counts = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
        blocks = np.searchsorted(self._before, rows, "right") - 1
        for block in np.unique(blocks).tolist():
            chosen = blocks == block
            layout = self._layout(block * _BLOCK, min((block + 1) * _BLOCK, len(self._documents)))
            numbers = rows[chosen] - self._before[block]
            run = np.searchsorted(layout.rows, numbers, "right")
            within = numbers - np.where(run > 0, layout.rows[run - 1], 0)
            starts[chosen] = layout.starts[run] + within * self._context
            counts[chosen] = np.minimum(layout.ends[run] - starts[chosen], self._context)
        return starts, counts

    def _bounds(self, first: int, last: int) -> np.ndarray:
        """Return where the documents ``first:last`` begin, and where the last one ends."""
        bounds = self._documents[first : last + 1]
        end = [] if last < len(self._documents) else [self._edge]
        return np.minimum(np.append(bounds, end).astype(np.int64), self._edge)


def _runs(bounds: np.ndarray, ends: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what a row that begins with each document leads to, as if it did, int64 ``[documents]``.

    Args:
        bounds: where documents begin, and the end of the last one.
        ends: for each document, the number of the one before which its last row has to end.
        context: tokens of a row.

    Returns:
        The number of the document with which the next run begins, and the rows up to there.
    """
    whole = np.maximum(-(-np.diff(bounds) // context) - 1, 0)  # rows without the end of a document
    following = np.searchsorted(bounds, bounds[:-1] + (whole + 1) * context, "right") - 1
    following = np.minimum(following, ends)
    return following, np.where(bounds[following] > bounds[:-1], whole + 1, 0)  # none of empty documents alone


def _count_rows(bounds: np.ndarray, context: int) -> list[int]:
    """Return the number of rows of each block, all blocks in step: a loop over documents would be slow."""
    count = len(bounds) - 1
    current = np.arange(0, count, _BLOCK)
    ends = np.minimum(current + _BLOCK, count)
    following, rows = _runs(bounds, np.repeat(ends, ends - current), context)
    total = np.zeros(len(current), np.int64)
    while len(open_blocks := np.flatnonzero(bounds[current] < bounds[ends])):
        runs = current[open_blocks]
        total[open_blocks] += rows[runs]
        current[open_blocks] = following[runs]
    return total.tolist()


def _layout_of(bounds_of: Callable[[int, int], np.ndarray], context: int, first: int, last: int) -> _Layout:
    """Return the rows of the block of the documents ``first:last``."""
    bounds = bounds_of(first, last)
    following, rows = _runs(bounds, np.full(last - first, last - first), context)
    runs, next_runs, edge = [], following.tolist(), int(np.searchsorted(bounds, bounds[-1]))
    number = 0
    while number < edge:
        runs.append(number)
        number = next_runs[number]
    chosen = np.array(runs, np.int64)
    return _Layout(np.cumsum(rows[chosen]), bounds[chosen], bounds[following[chosen]])
