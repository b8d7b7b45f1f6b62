"""Context ranks: each has two chunks of every row's positions, and they exchange keys and values in every layer.

A row is cut into 2c chunks for c ranks. Rank r has chunks r and 2c - 1 - r, so that causal attention is as much work on
all of them (Llama Team 2024, "The Llama 3 Herd of Models", section 3.3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hvdlm.parallel.mesh import Mesh
from hvdlm.protocols.group import Group, Handle
from hvdlm.protocols.types import Batch, Tensor
from hvdlm.protocols.world import World


class ContextRanks:
    """The context ranks that share their rows with this one; all call the same collectives in the same order.

    Attributes:
        size: how many there are.
        index: this rank's index among them.
        group: all of them.
        groups: all groups whose collectives these are.
    """

    def __init__(self, group: Group, rank: int, before: Group, after: Group) -> None:
        self.group = group
        self.size = len(group.ranks)
        self.index = group.ranks.index(rank)
        self.groups = [group, before, after]
        self._before, self._after = before, after
        self._before_rank = group.ranks[self.index - 1]
        self._rank = rank
        self._sends: list[Handle] = []

    @property
    def chunks(self) -> tuple[int, int]:
        """The numbers of this rank's chunks, of ``2 size``."""
        return self.index, 2 * self.size - 1 - self.index

    def cut(self, batch: Batch) -> Batch:
        """Return this rank's positions of a batch, ``[rows, time / size]``.

        Where the chunks don't divide the time, rows are padded at their ends, which no target there is counts.
        """
        weights, missing = batch.weights, -batch.inputs.shape[1] % (2 * self.size)
        if missing and weights is None:
            weights = np.ones(batch.inputs.shape, np.float32)
        cut = [None if array is None else self._cut(array, missing) for array in (batch.inputs, batch.targets, weights)]
        assert cut[0] is not None and cut[1] is not None
        return replace(batch, inputs=cut[0], targets=cut[1], weights=cut[2])

    def _cut(self, array: np.ndarray, missing: int) -> np.ndarray:
        rows = np.pad(array, ((0, 0), (0, missing)))
        by_chunk = rows.reshape(len(rows), 2 * self.size, -1)
        return by_chunk[:, list(self.chunks)].reshape(len(rows), -1)

    def positions(self, time: int) -> np.ndarray:
        """Return the positions, in their rows, of the ``time`` that this rank has, int64 ``[time]``."""
        length = time // 2
        return np.concatenate([np.arange(chunk * length, (chunk + 1) * length) for chunk in self.chunks])

    def shift(self, tensor: Tensor, name: str) -> Handle:
        """Start to send ``tensor`` to the next rank; the handle's result is what the one before sends, of its shape.

        ``tensor`` must not change until ``sent`` returns. Not inside of a TensorFlow graph.
        """
        send = self._after.broadcast_async(tensor, self._after.ranks.index(self._rank), f"{name}.{self._rank}")
        self._sends.append(send)
        root = self._before.ranks.index(self._before_rank)
        return self._before.broadcast_async(tensor, root, f"{name}.{self._before_rank}")

    def sent(self) -> None:
        """Wait until all that was given to ``shift`` has been sent."""
        for send in self._sends:
            send.wait()
        self._sends.clear()

    def visible(self, source: int, time: int) -> tuple[slice, slice]:
        """Return which of this rank's queries see keys of rank ``source``, and which keys: all of these by all.

        Of this rank itself it is all: each query sees the keys up to its own.
        """
        whole, half = slice(0, time), time // 2
        if source == self.index:
            return whole, whole
        return (whole, slice(0, half)) if source < self.index else (slice(half, time), whole)


def make_context_ranks(world: World, mesh: Mesh) -> ContextRanks | None:
    """Return those of this rank of ``world``; None: it has all positions."""
    if mesh.context == 1:
        return None
    rank, index = world.rank, mesh.coordinates(world.rank)["context"]
    before, after = (world.group(mesh.hop(rank, at % mesh.context)) for at in (index - 1, index))
    return ContextRanks(world.group(mesh.group("context", rank)), rank, before, after)


def cut_all(batches: Sequence[Batch], ranks: ContextRanks | None) -> Sequence[Batch]:
    """Return this rank's positions of every batch."""
    return batches if ranks is None else [ranks.cut(batch) for batch in batches]
