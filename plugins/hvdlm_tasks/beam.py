"""Beam search: the likeliest sequences that a model writes about what it has read, by any framework."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hvdlm.protocols.trainable import Trainable
from hvdlm.protocols.types import Batch
from hvdlm.tasks.likelihood import log_softmax


class Found(NamedTuple):
    """A finished sequence: its score, a log-probability over a length penalty, and its tokens without the last."""

    score: float
    tokens: list[int]


class _Row:
    """One row's beams and what has been finished of it."""

    def __init__(self, beams: int, most: int, power: float) -> None:
        self.beams, self.most, self._power = beams, most, power
        self.scores = np.array([0.0] + [-np.inf] * (beams - 1))
        self.tokens: list[list[int]] = [[] for _ in range(beams)]
        self.finished: list[Found] = []

    def step(self, logs: np.ndarray, end: int) -> tuple[list[int], list[int]]:
        """Grow by one token, given log-probabilities ``[beams, vocab]``; return (beam, token) of those that go on."""
        total = (self.scores[:, None] + logs).ravel()
        count = min(2 * self.beams, total.size)
        best = np.argpartition(-total, count - 1)[:count]
        origins: list[int] = []
        tokens: list[int] = []
        scores: list[float] = []
        grown: list[list[int]] = []
        for rank, place in enumerate(best[np.argsort(-total[best], kind="stable")]):
            beam, token = divmod(int(place), logs.shape[1])
            if not np.isfinite(total[place]):
                break
            if token == end:
                if rank < self.beams:
                    score = total[place] / self._penalty(len(self.tokens[beam]) + 1)
                    self.finished.append(Found(score, self.tokens[beam]))
            elif len(tokens) < self.beams:
                origins.append(beam)
                tokens.append(token)
                scores.append(total[place])
                grown.append([*self.tokens[beam], token])
        self.scores = np.array(scores)
        self.tokens = grown
        return origins, tokens

    def done(self) -> bool:
        """Return whether nothing better can come."""
        length = len(self.tokens[0]) if self.tokens else 0
        if not len(self.scores) or length >= self.most:
            return True
        if len(self.finished) < self.beams:
            return False
        worst = sorted(self.finished, reverse=True)[self.beams - 1].score
        return bool(self.scores.max() / self._penalty(self.most + 1) <= worst)

    def best(self) -> list[int]:
        """Return the tokens of the best sequence."""
        going = [Found(s / self._penalty(len(t)), t) for s, t in zip(self.scores, self.tokens, strict=True) if t]
        return max(self.finished or going or [Found(0.0, [])]).tokens

    def _penalty(self, length: int) -> float:
        return float(((5 + length) / 6) ** self._power)


def beam_search(
    trainable: Trainable, batch: Batch, beams: int, most: list[int], ends: tuple[int, int], power: float
) -> list[list[int]]:
    """Return what the model writes about every row of ``batch``, without the token of the end.

    ``beams`` sequences of a row are followed at once (1: always the likeliest token), none longer than ``most`` of its
    row; ``ends``: the tokens of the beginning and of the end; ``power``: of the length penalty (Wu et al. 2016, eq. 14)
    """
    rows = [_Row(beams, limit, power) for limit in most]
    active = list(range(len(rows)))
    cache = trainable.read(batch)
    tokens = np.full((len(rows), 1), ends[0], np.int32)
    width = 1  # all beams of a row begin as one
    while active:
        scores, cache = trainable.logits(tokens, cache)
        logs = log_softmax(scores).reshape(len(active), width, -1)
        origins, following, going = [], [], []
        for place, number in enumerate(active):
            row = rows[number]
            given = logs[place] if width == beams else np.repeat(logs[place], beams, 0)
            chosen, new = row.step(given[: len(row.scores)], ends[1])
            if row.done():
                continue
            spare = beams - len(new)  # beams that have ended: computed, and never chosen
            row.scores = np.concatenate([row.scores, np.full(spare, -np.inf)])
            row.tokens += [[]] * spare
            going.append(number)
            origins += [place * width + min(beam, width - 1) for beam in [*chosen, *[0] * spare]]
            following += [*new, *[ends[1]] * spare]
        active, width = going, beams
        if active:
            cache = trainable.select(cache, np.array(origins, np.int64))
            tokens = np.array(following, np.int32)[:, None]
    return [row.best() for row in rows]
