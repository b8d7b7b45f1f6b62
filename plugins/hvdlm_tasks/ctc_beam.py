"""Prefix beam search: the likeliest texts under CTC, each with all the ways in which frames can spell it.

Hannun et al. 2014, "First-Pass Large Vocabulary Continuous Speech Recognition using Bi-Directional Recurrent DNNs",
algorithm 1, without a language model; Graves and Jaitly 2014, "Towards End-to-End Speech Recognition with Recurrent
Neural Networks", algorithm 1. What a prefix that is not followed any more has gathered is forgotten.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_ROOT, _DEAD, _NOWHERE = 0, -1, -2  # numbers of prefixes: the empty one, one that can't be, what lies before both


class Reading(NamedTuple):
    """What a row may say: its log-probability, summed over alignments, and its ids, without blanks."""

    log: float
    ids: list[int]


def prefix_beam_search(logs: np.ndarray, lengths: np.ndarray, beams: int) -> list[list[Reading]]:
    """Return the likeliest texts of every row, at most ``beams`` of them, the best first.

    ``logs``: log-probabilities ``[rows, time, vocab]`` of every frame, id 0 the blank; ``lengths`` ``[rows]``: how many
    frames of a row count. Where no row has more than ``beams`` prefixes the log-probabilities are exact, else they are
    lower bounds: what pruned prefixes would have added is missing.
    """
    search = _Search(len(logs), beams)
    for time in range(int(lengths.max(initial=0))):
        rows = np.flatnonzero(lengths > time)
        search.step(rows, logs[rows, time].astype(np.float64))
    return search.readings()


class _Search:
    """The prefixes that are followed, ``[rows, beams]``, the best first.

    Of each: its number, that of the prefix it grew from, its last id, and the log-probabilities of all alignments that
    spell it and end in a blank (``blank``) or in its last id (``other``).
    """

    def __init__(self, rows: int, beams: int) -> None:
        self._number = np.full((rows, beams), _DEAD, np.int64)
        self._before = np.full((rows, beams), _NOWHERE, np.int64)
        self._last = np.zeros((rows, beams), np.int64)
        self._blank, self._other = np.full((2, rows, beams), -np.inf)
        self._number[:, 0], self._blank[:, 0] = _ROOT, 0.0
        # A prefix has one number however often it is dropped and found again: those grown from it know it by that.
        self._known: dict[tuple[int, int], int] = {}
        self._grown: list[tuple[int, int]] = [(_NOWHERE, 0)]  # of each number: what it grew from, and its last id

    def step(self, rows: np.ndarray, logs: np.ndarray) -> None:
        """Hear one more frame of ``rows``, with log-probabilities ``[rows, vocab]``."""
        number, last = self._number[rows], self._last[rows]
        blank, other = self._blank[rows], self._other[rows]
        total = np.logaddexp(blank, other)
        spoken = np.take_along_axis(logs, last, 1)  # [rows, beams]: each prefix's last id once more
        more = logs[:, None] + total[..., None]  # [rows, beams, vocab]
        np.put_along_axis(more, last[..., None], (spoken + blank)[..., None], 2)  # twice the same: a blank between
        more[..., 0] = -np.inf
        met = _taken(more, number, self._before[rows], last)
        blank, other = total + logs[:, :1], np.logaddexp(other + spoken, met)
        every = np.concatenate([np.logaddexp(blank, other), more.reshape(len(rows), -1)], 1)
        best = _best(every, number.shape[1])
        self._keep(rows, best, np.take_along_axis(every, best, 1), (blank, other), logs.shape[1])

    def _keep(
        self, rows: np.ndarray, best: np.ndarray, scores: np.ndarray, stay: tuple[np.ndarray, np.ndarray], vocab: int
    ) -> None:
        """Follow ``best`` ``[rows, beams]``: below ``beams`` a prefix that stays, above it one that grows by an id."""
        beams = best.shape[1]
        grows = best >= beams
        origin, added = np.divmod(np.where(grows, best - beams, best * vocab), vocab)
        number, before, last = (
            np.take_along_axis(kept[rows], origin, 1) for kept in (self._number, self._before, self._last)
        )
        blank, other = (np.take_along_axis(kept, origin, 1) for kept in stay)
        before, last = np.where(grows, number, before), np.where(grows, added, last)
        blank, other = np.where(grows, -np.inf, blank), np.where(grows, scores, other)
        dead = np.isneginf(scores)
        for place in zip(*np.nonzero(grows & ~dead), strict=True):
            number[place] = self._numbered(int(before[place]), int(last[place]))
        number[dead], before[dead], last[dead] = _DEAD, _NOWHERE, 0
        self._number[rows], self._before[rows], self._last[rows] = number, before, last
        self._blank[rows], self._other[rows] = blank, other

    def _numbered(self, before: int, last: int) -> int:
        number = self._known.setdefault((before, last), len(self._grown))
        if number == len(self._grown):
            self._grown.append((before, last))
        return number

    def readings(self) -> list[list[Reading]]:
        """Return what every row may say."""
        total = np.logaddexp(self._blank, self._other)
        rows = zip(total.tolist(), self._number.tolist(), strict=True)
        return [
            [Reading(log, self._ids(n)) for log, n in zip(logs, numbers, strict=True) if n != _DEAD]
            for logs, numbers in rows
        ]

    def _ids(self, number: int) -> list[int]:
        ids = []
        while number != _ROOT:
            number, last = self._grown[number]
            ids.append(last)
        return ids[::-1]


def _taken(more: np.ndarray, number: np.ndarray, before: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Return what prefixes gain from those that grow into them, ``[rows, beams]``, taken out of ``more``."""
    same = before[:, :, None] == number[:, None]  # [rows, beams, the prefix it grew from]
    row, place, origin = np.nonzero(same)
    found = np.full(number.shape, -np.inf)
    found[row, place] = more[row, origin, last[row, place]]
    more[row, origin, last[row, place]] = -np.inf
    return found


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    """Return the places of the ``count`` highest of each row, the highest first, of equal ones the first."""
    chosen = np.sort(np.argpartition(-scores, count - 1, 1)[:, :count], 1)
    order = np.argsort(-np.take_along_axis(scores, chosen, 1), 1, kind="stable")
    return np.take_along_axis(chosen, order, 1)
