"""Ranks with more and fewer validation batches evaluate equally many, where all gather every layer (ZeRO-3)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hvdlm.protocols.types import Batch
from hvdlm.training import lockstep
from hvdlm.training.lockstep import in_lockstep


class OneOfSeveral:
    """The world of a rank among others with ``counts`` batches."""

    def __init__(self, *counts: int) -> None:
        self._left = list(counts)

    def gather_objects(self, own: int) -> list[Any]:
        """Return this rank's value and those of the others, which count up to ``_TOGETHER`` batches at a time."""
        counts = [min(lockstep._TOGETHER, left) for left in self._left]
        self._left = [left - more for left, more in zip(self._left, counts, strict=True)]
        return [own, *counts]


def batch(number: int) -> Batch:
    tokens = np.full((2, 3), number, np.int32)
    return Batch(tokens, tokens, None, corpus="news")


@pytest.mark.parametrize("own, others", [(3, (5, 3)), (0, (1,)), (16, (40, 2)), (33, (0,)), (0, (0, 0))])
def test_every_rank_evaluates_as_many_batches_as_any_other(own: int, others: tuple[int, ...]) -> None:
    world: Any = OneOfSeveral(*others)
    pairs = list(in_lockstep(world, map(batch, range(own)), 5))
    assert len(pairs) == max(own, *others)
    assert [one.inputs[0, 0] for one, of_split in pairs if of_split] == list(range(own))
    added = [one for one, of_split in pairs if not of_split]
    assert all(one.tokens == 0 and one.inputs.shape == ((2, 3) if own else (1, 5)) for one in added)
