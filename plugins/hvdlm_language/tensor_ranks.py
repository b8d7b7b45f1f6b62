"""The framework-independent part of tensor parallelism's differentiable collectives."""

from __future__ import annotations

from typing import Any, TypeVar

from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm.protocols.group import Group

Ranks = TypeVar("Ranks", bound="TensorRanks")


class TensorRanks:
    """A rank's tensor group; all its ranks call the same collectives in the same order.

    ``sequence``: whether, outside of the layers' matrix products, a rank holds only its shard of the positions.
    """

    def __init__(self, group: Group, model_shard: ModelShard, sequence: bool | None = None) -> None:
        self.group = group
        self.model_shard = model_shard
        self.size = model_shard.tensor
        self.index = model_shard.index
        self.sequence = model_shard.sequence if sequence is None else sequence
        self._whole: Any = type(self)(group, model_shard, False) if self.sequence else self

    def over(self: Ranks, time: int) -> Ranks:
        """Return the collectives for ``time`` positions, which are sharded only where the ranks divide them."""
        whole: Ranks = self._whole
        return whole if time % self.size else self

    def alone(self: Ranks) -> Ranks:
        """Return the collectives that don't shard positions, for generation."""
        whole: Ranks = self._whole
        return whole
