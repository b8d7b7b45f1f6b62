"""Beam search for encoder-decoder models, independent of the framework."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hvdlm.protocols.trainable import Trainable
from hvdlm.protocols.types import Batch
from hvdlm_language.likelihood import log_softmax


class Hypothesis(NamedTuple):
    """A sequence: its log-probability divided by the length penalty, and its tokens without the end token."""

    score: float
    tokens: list[int]


class _RowSearch:
    """The beams of one row and the hypotheses that are finished."""

    def __init__(self, beams: int, max_length: int, length_penalty: float) -> None:
        self.beams = beams
        self.max_length = max_length
        self._length_penalty = length_penalty
        self.scores = np.array([0.0] + [-np.inf] * (beams - 1))
        self.tokens: list[list[int]] = [[] for _ in range(beams)]
        self.finished: list[Hypothesis] = []

    def step(self, logs: np.ndarray, end: int) -> tuple[list[int], list[int]]:
        """Extend the beams by one token, given log-probabilities ``[beams, vocab]``.

        Return, for every beam that continues, the beam it extends and its new token.
        """
        total = (self.scores[:, None] + logs).ravel()
        count = min(2 * self.beams, total.size)  # a beam ends at most once, so that enough continue
        best = np.argpartition(-total, count - 1)[:count]
        origins: list[int] = []
        tokens: list[int] = []
        scores: list[float] = []
        extended: list[list[int]] = []
        for rank, candidate in enumerate(best[np.argsort(-total[best], kind="stable")]):
            beam, token = divmod(int(candidate), logs.shape[1])
            if not np.isfinite(total[candidate]):
                break
            if token == end:
                if rank < self.beams:
                    score = total[candidate] / self._penalty(len(self.tokens[beam]) + 1)
                    self.finished.append(Hypothesis(score, self.tokens[beam]))
            elif len(tokens) < self.beams:
                origins.append(beam)
                tokens.append(token)
                scores.append(total[candidate])
                extended.append([*self.tokens[beam], token])
        self.scores = np.array(scores)
        self.tokens = extended
        return origins, tokens

    def done(self) -> bool:
        """Return whether no unfinished beam can become better than the finished hypotheses."""
        length = len(self.tokens[0]) if self.tokens else 0
        if not len(self.scores) or length >= self.max_length:
            return True
        if len(self.finished) < self.beams:
            return False
        worst = sorted(self.finished, reverse=True)[self.beams - 1].score
        return bool(self.scores.max() / self._penalty(self.max_length + 1) <= worst)

    def best(self) -> list[int]:
        """Return the tokens of the best finished hypothesis, or of the best unfinished one if there is none."""
        unfinished = [
            Hypothesis(score / self._penalty(len(tokens)), tokens)
            for score, tokens in zip(self.scores, self.tokens, strict=True)
            if tokens
        ]
        return max(self.finished or unfinished or [Hypothesis(0.0, [])]).tokens

    def _penalty(self, length: int) -> float:
        return float(((5 + length) / 6) ** self._length_penalty)


def beam_search(
    trainable: Trainable,
    batch: Batch,
    beams: int,
    max_lengths: list[int],
    begin_end: tuple[int, int],
    length_penalty: float,
) -> list[list[int]]:
    """Return the best output sequence of every row of ``batch``, without the end token.

    Args:
        trainable: an encoder-decoder model.
        batch: its ``features`` are the inputs.
        beams: beam width; 1: greedy search.
        max_lengths: the most tokens of each row's output.
        begin_end: the ids of the begin and the end token.
        length_penalty: the exponent of the length penalty (Wu et al. 2016, eq. 14).
    """
    begin, end = begin_end
    rows = [_RowSearch(beams, max_length, length_penalty) for max_length in max_lengths]
    active = list(range(len(rows)))
    cache = trainable.read(batch)
    tokens = np.full((len(rows), 1), begin, np.int32)
    width = 1  # all beams of a row start as one
    while active:
        scores, cache = trainable.logits(tokens, cache)
        logs = log_softmax(scores).reshape(len(active), width, -1)
        origins: list[int] = []
        next_tokens: list[int] = []
        continuing: list[int] = []
        for index, number in enumerate(active):
            row = rows[number]
            row_logs = logs[index] if width == beams else np.repeat(logs[index], beams, 0)
            row_origins, row_tokens = row.step(row_logs[: len(row.scores)], end)
            if row.done():
                continue
            padding = beams - len(row_tokens)  # finished beams: computed, but never chosen
            row.scores = np.concatenate([row.scores, np.full(padding, -np.inf)])
            row.tokens += [[]] * padding
            continuing.append(number)
            origins += [index * width + min(beam, width - 1) for beam in [*row_origins, *[0] * padding]]
            next_tokens += [*row_tokens, *[end] * padding]
        active = continuing
        width = beams
        if active:
            cache = trainable.select(cache, np.array(origins, np.int64))
            tokens = np.array(next_tokens, np.int32)[:, None]
    return [row.best() for row in rows]
