"""Evaluation of as many batches on every rank, where all of them gather each layer's parameters (ZeRO-3)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice

import numpy as np

from hvdlm.protocols.types import Batch
from hvdlm.protocols.world import World

_TOGETHER = 16  # batches after which ranks compare how many they have


def in_lockstep(world: World, batches: Iterable[Batch], context: int) -> Iterator[tuple[Batch, bool]]:
    """Yield (batch, True) of this rank's, and (a batch without a target, False) while others have more. All ranks call.

    ``context``: the positions of such a batch on a rank that has none at all.
    """
    nothing = np.zeros((1, context), np.int32)
    empty = Batch(nothing, nothing, np.zeros((1, context), np.float32), True)
    own = iter(batches)
    while True:
        next_ones = list(islice(own, _TOGETHER))
        most = max(world.gather_objects(len(next_ones)))
        for batch in next_ones:
            empty = replace(batch, weights=np.zeros(batch.targets.shape, np.float32), corpus="")
            yield batch, True
        yield from [(empty, False)] * (most - len(next_ones))
        if most < _TOGETHER:
            return
