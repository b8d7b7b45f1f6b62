"""Sharded optimizers (ZeRO, Rajbhandari et al. 2020): every data rank updates an equal shard of the parameters.

Instead of one all-reduce of the gradients, a step does a reduce-scatter of them (each rank receives its shard of the
sum) and, after the update, an all-gather of the parameters: the same bytes on the wire, and only a shard of the
optimizer's state on every rank (stage 1), and of the gradients too (stage 2, where every micro-batch's gradients are
scattered). In stage 3, ranks hold no more than a shard of the parameters, either, and gather each layer's before its
forward and before its backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hvdlm.communication.all_reduce import AllReduceExchange
from hvdlm.config import CommunicationConfig
from hvdlm.parallel.flat_layout import FlatLayout
from hvdlm.protocols.exchange import ExchangeTraits
from hvdlm.protocols.group import Group, Handle
from hvdlm.protocols.types import Tensor


class ZeroExchange(AllReduceExchange):
    """Scatters the sums of gradients over the data axis, and gathers the updated parameters."""

    def __init__(self, group: Group, options: CommunicationConfig, index: int, stage: int) -> None:
        super().__init__(group, options)
        self.traits = ExchangeTraits(
            self.size, zero_rank=index, zero_size=self.size, scatters_every=stage >= 2, shards_parameters=stage == 3
        )

    def open(self, layout: FlatLayout, parameters: np.ndarray) -> None:
        """Store the number of buckets."""
        self._buckets = range(len(layout.buckets))

    def start(self, bucket: Tensor, index: int) -> Handle:
        """Start to sum the bucket; the handle's result is this rank's shard of the sum, ``[elements / ranks]``."""
        return self.scaled(self._group.reduce_scatter_async(self.predivided(bucket), f"gradients.{index}"))

    def gather_vector(self, shard: Tensor, index: int, purpose: str) -> Handle:
        """Start to gather, unrounded, what every rank has for its shard of bucket ``index``; result ``[elements]``."""
        return self._group.all_gather_async(shard, f"{purpose}.{index}")

    def gather(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """Return every bucket's parameters from this rank's updated shards of them."""
        started = [self._group.all_gather_async(shards[i], f"parameters.{i}") for i in self._buckets]
        return [handle.wait() for handle in started]
