"""Beam search finds what an exhaustive search finds, where it may look at as much."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from hvdlm_tasks.beam import beam_search

from hvdlm.protocols.types import Batch

VOCAB, BEGIN, END, MOST = 4, 2, 3, 4


class Fixed:
    """Scores that depend on the row and on all that was written, at random but always the same."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self.widths: list[int] = []

    def read(self, batch: Batch) -> list[tuple[int, ...]]:
        return [(row,) for row in range(self._rows)]

    def select(self, cache: list[tuple[int, ...]], rows: np.ndarray) -> list[tuple[int, ...]]:
        return [cache[i] for i in rows]

    def logits(self, tokens: np.ndarray, cache: list[tuple[int, ...]]) -> tuple[np.ndarray, Any]:
        grown = [(*kept, int(token)) for kept, (token,) in zip(cache, tokens, strict=True)]
        self.widths.append(len(grown))
        return np.stack([self.scores(kept) for kept in grown]), grown

    @staticmethod
    def scores(kept: tuple[int, ...]) -> np.ndarray:
        found = np.random.default_rng(kept).standard_normal(VOCAB).astype(np.float32) * 2
        found[BEGIN] = -30
        return found


def logs(kept: tuple[int, ...]) -> np.ndarray:
    wide = Fixed.scores(kept).astype(np.float64)
    return wide - np.log(np.exp(wide).sum())


def best(row: int, power: float) -> list[int]:
    """Return the best of all sequences of at most ``MOST`` tokens, by trying every one."""
    found = []
    for length in range(MOST + 1):
        for text in product((0, 1), repeat=length):
            whole = (*text, END)
            total = sum(logs((row, BEGIN, *whole[:i]))[token] for i, token in enumerate(whole))
            found.append((total / ((5 + len(whole)) / 6) ** power, list(text)))
    return max(found)[1]


@pytest.mark.parametrize("power", [0.0, 0.6, 1.0])
def test_with_beams_enough_it_is_the_best_of_all_sequences(power: float) -> None:
    rows = 12
    batch = Batch(np.zeros((rows, 1), np.int32), np.zeros((rows, 1), np.int32))
    found = beam_search(Fixed(rows), batch, 40, [MOST + 1] * rows, (BEGIN, END), power)
    expected = [best(row, power) for row in range(rows)]
    assert [text if len(text) <= MOST else None for text in found] == expected


def test_one_beam_takes_the_likeliest_token_each_time() -> None:
    batch = Batch(np.zeros((6, 1), np.int32), np.zeros((6, 1), np.int32))
    found = beam_search(Fixed(6), batch, 1, [10] * 6, (BEGIN, END), 0.0)
    for row, text in enumerate(found):
        kept: tuple[int, ...] = (row, BEGIN)
        for token in text:
            assert int(logs(kept).argmax()) == token
            kept = (*kept, token)
        assert len(text) == 10 or int(logs(kept).argmax()) == END


def test_rows_that_are_done_are_not_computed_any_more_and_none_is_longer_than_its_most() -> None:
    model, most = Fixed(8), [1, 2, 3, 4, 5, 6, 7, 8]
    batch = Batch(np.zeros((8, 1), np.int32), np.zeros((8, 1), np.int32))
    found = beam_search(model, batch, 2, most, (BEGIN, END), 0.6)
    assert model.widths[0] == 8 and model.widths[-1] < 16 and sorted(model.widths[1:], reverse=True) == model.widths[1:]
    assert all(len(text) <= limit for text, limit in zip(found, most, strict=True))
