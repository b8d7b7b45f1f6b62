"""CTC prefix beam search: the most probable transcripts, summed over all alignments.

Hannun et al. 2014, "First-Pass Large Vocabulary Continuous Speech Recognition using Bi-Directional Recurrent DNNs",
algorithm 1, without a language model; Graves and Jaitly 2014, "Towards End-to-End Speech Recognition with Recurrent
Neural Networks", algorithm 1. The probability that a pruned prefix has gathered is discarded.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Ids of prefixes: the empty prefix, an unused beam, the parent of both.
_ROOT, _UNUSED, _NO_PARENT = 0, -1, -2


class Transcript(NamedTuple):
    """A candidate text: its log-probability, summed over alignments, and its ids, without blanks."""

    log_probability: float
    ids: list[int]


def prefix_beam_search(logs: np.ndarray, lengths: np.ndarray, beams: int) -> list[list[Transcript]]:
    """Return the most probable transcripts of every row, at most ``beams``, the best first.

    Args:
        logs: log-probabilities ``[rows, time, vocab]`` of every frame; id 0 is the blank.
        lengths: the number of valid frames of each row, ``[rows]``.
        beams: beam width.

    Where no row has more than ``beams`` prefixes, the log-probabilities are exact; otherwise they are lower bounds,
    since the contributions of pruned prefixes are missing.
    """
    search = _Search(len(logs), beams)
    for time in range(int(lengths.max(initial=0))):
        rows = np.flatnonzero(lengths > time)
        search.step(rows, logs[rows, time].astype(np.float64))
    return search.transcripts()


class _Search:
    """The prefixes in the beams, ``[rows, beams]``, the best first.

    Of each: its id, its parent's id (the prefix without the last symbol), its last symbol, and the log-probabilities
    of all alignments that spell it and end in a blank (``blank``) or in its last symbol (``symbol``).
    """

    def __init__(self, rows: int, beams: int) -> None:
        self._prefix = np.full((rows, beams), _UNUSED, np.int64)
        self._parent = np.full((rows, beams), _NO_PARENT, np.int64)
        self._last = np.zeros((rows, beams), np.int64)
        self._blank, self._symbol = np.full((2, rows, beams), -np.inf)
        self._prefix[:, 0] = _ROOT
        self._blank[:, 0] = 0.0
        # A prefix keeps its id when it is pruned and appears again: its extensions refer to it by that id.
        self._ids_by_extension: dict[tuple[int, int], int] = {}
        self._extensions: list[tuple[int, int]] = [(_NO_PARENT, 0)]  # of each prefix id: parent and last symbol

    def step(self, rows: np.ndarray, logs: np.ndarray) -> None:
        """Advance ``rows`` by one frame with log-probabilities ``[rows, vocab]``."""
        prefix, last = self._prefix[rows], self._last[rows]
        blank, symbol = self._blank[rows], self._symbol[rows]
        total = np.logaddexp(blank, symbol)
        repeated = np.take_along_axis(logs, last, 1)  # [rows, beams]: each prefix's last symbol again
        extended = logs[:, None] + total[..., None]  # [rows, beams, vocab]
        # The same symbol twice needs a blank in between.
        np.put_along_axis(extended, last[..., None], (repeated + blank)[..., None], 2)
        extended[..., 0] = -np.inf
        merged = _take_merged(extended, prefix, self._parent[rows], last)
        blank, symbol = total + logs[:, :1], np.logaddexp(symbol + repeated, merged)
        candidates = np.concatenate([np.logaddexp(blank, symbol), extended.reshape(len(rows), -1)], 1)
        best = _best(candidates, prefix.shape[1])
        self._keep(rows, best, np.take_along_axis(candidates, best, 1), (blank, symbol), logs.shape[1])

    def _keep(
        self,
        rows: np.ndarray,
        best: np.ndarray,
        scores: np.ndarray,
        unextended: tuple[np.ndarray, np.ndarray],
        vocab: int,
    ) -> None:
        """Keep the candidates ``best`` ``[rows, beams]``; those below ``beams`` are unextended prefixes."""
        beams = best.shape[1]
        extends = best >= beams
        origin, added = np.divmod(np.where(extends, best - beams, best * vocab), vocab)
        prefix, parent, last = (
            np.take_along_axis(values[rows], origin, 1) for values in (self._prefix, self._parent, self._last)
        )
        blank, symbol = (np.take_along_axis(values, origin, 1) for values in unextended)
        parent, last = np.where(extends, prefix, parent), np.where(extends, added, last)
        blank, symbol = np.where(extends, -np.inf, blank), np.where(extends, scores, symbol)
        unused = np.isneginf(scores)
        for index in zip(*np.nonzero(extends & ~unused), strict=True):
            prefix[index] = self._prefix_id(int(parent[index]), int(last[index]))
        prefix[unused], parent[unused], last[unused] = _UNUSED, _NO_PARENT, 0
        self._prefix[rows], self._parent[rows], self._last[rows] = prefix, parent, last
        self._blank[rows], self._symbol[rows] = blank, symbol

    def _prefix_id(self, parent: int, last: int) -> int:
        prefix = self._ids_by_extension.setdefault((parent, last), len(self._extensions))
        if prefix == len(self._extensions):
            self._extensions.append((parent, last))
        return prefix

    def transcripts(self) -> list[list[Transcript]]:
        """Return the transcripts of every row."""
        total = np.logaddexp(self._blank, self._symbol)
        rows = zip(total.tolist(), self._prefix.tolist(), strict=True)
        return [
            [
                Transcript(log, self._symbols(prefix))
                for log, prefix in zip(logs, prefixes, strict=True)
                if prefix != _UNUSED
            ]
            for logs, prefixes in rows
        ]

    def _symbols(self, prefix: int) -> list[int]:
        symbols = []
        while prefix != _ROOT:
            prefix, last = self._extensions[prefix]
            symbols.append(last)
        return symbols[::-1]


def _take_merged(extended: np.ndarray, prefix: np.ndarray, parent: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Remove the extensions that equal another beam's prefix from ``extended``; return them as ``[rows, beams]``."""
    equal = parent[:, :, None] == prefix[:, None]  # [rows, beams, the parent's beam]
    row, beam, origin = np.nonzero(equal)
    merged = np.full(prefix.shape, -np.inf)
    merged[row, beam] = extended[row, origin, last[row, beam]]
    extended[row, origin, last[row, beam]] = -np.inf
    return merged


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of the ``count`` highest scores of each row, in descending order; ties by index."""
    chosen = np.sort(np.argpartition(-scores, count - 1, 1)[:, :count], 1)
    order = np.argsort(-np.take_along_axis(scores, chosen, 1), 1, kind="stable")
    return np.take_along_axis(chosen, order, 1)
