"""Beam search compared with exhaustive search and greedy decoding."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from hvdlm.protocols.types import Batch
from hvdlm_tasks.beam import beam_search

VOCAB, BEGIN, END, LONGEST = 4, 2, 3, 4


class FixedScores:
    """A decoder whose scores depend on the row and its tokens so far, fixed pseudo-random numbers."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self.widths: list[int] = []

    def read(self, batch: Batch) -> list[tuple[int, ...]]:
        return [(row,) for row in range(self._rows)]

    def select(self, cache: list[tuple[int, ...]], rows: np.ndarray) -> list[tuple[int, ...]]:
        return [cache[i] for i in rows]

    def logits(self, tokens: np.ndarray, cache: list[tuple[int, ...]]) -> tuple[np.ndarray, Any]:
        longer = [(*prefix, int(token)) for prefix, (token,) in zip(cache, tokens, strict=True)]
        self.widths.append(len(longer))
        return np.stack([self.scores(prefix) for prefix in longer]), longer

    @staticmethod
    def scores(prefix: tuple[int, ...]) -> np.ndarray:
        scores = np.random.default_rng(prefix).standard_normal(VOCAB).astype(np.float32) * 2
        scores[BEGIN] = -30
        return scores


def logs(prefix: tuple[int, ...]) -> np.ndarray:
    scores = FixedScores.scores(prefix).astype(np.float64)
    return scores - np.log(np.exp(scores).sum())


def best(row: int, power: float) -> list[int]:
    """Return the best of all sequences of at most ``LONGEST`` tokens, by trying every one."""
    candidates = []
    for length in range(LONGEST + 1):
        for text in product((0, 1), repeat=length):
            sequence = (*text, END)
            total = sum(logs((row, BEGIN, *sequence[:i]))[token] for i, token in enumerate(sequence))
            candidates.append((total / ((5 + len(sequence)) / 6) ** power, list(text)))
    return max(candidates)[1]


@pytest.mark.parametrize("power", [0.0, 0.6, 1.0])
def test_with_enough_beams_the_result_is_the_exhaustive_optimum(power: float) -> None:
    rows = 12
    batch = Batch(np.zeros((rows, 1), np.int32), np.zeros((rows, 1), np.int32))
    texts = beam_search(FixedScores(rows), batch, 40, [LONGEST + 1] * rows, (BEGIN, END), power)
    expected = [best(row, power) for row in range(rows)]
    assert [text if len(text) <= LONGEST else None for text in texts] == expected


def test_one_beam_equals_greedy_decoding() -> None:
    batch = Batch(np.zeros((6, 1), np.int32), np.zeros((6, 1), np.int32))
    texts = beam_search(FixedScores(6), batch, 1, [10] * 6, (BEGIN, END), 0.0)
    for row, text in enumerate(texts):
        tokens: tuple[int, ...] = (row, BEGIN)
        for next_token in text:
            assert int(logs(tokens).argmax()) == next_token
            tokens = (*tokens, next_token)
        assert len(text) == 10 or int(logs(tokens).argmax()) == END


def test_finished_rows_are_dropped_and_lengths_are_limited() -> None:
    model, limits = FixedScores(8), [1, 2, 3, 4, 5, 6, 7, 8]
    batch = Batch(np.zeros((8, 1), np.int32), np.zeros((8, 1), np.int32))
    texts = beam_search(model, batch, 2, limits, (BEGIN, END), 0.6)
    assert model.widths[0] == 8 and model.widths[-1] < 16 and sorted(model.widths[1:], reverse=True) == model.widths[1:]
    assert all(len(text) <= limit for text, limit in zip(texts, limits, strict=True))
