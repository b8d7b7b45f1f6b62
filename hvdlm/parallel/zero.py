"""Sharded optimizers (ZeRO, Rajbhandari et al. 2020): every data rank updates an equal part of the parameters.

Instead of one all-reduce of the gradients, a step does a reduce-scatter of them (each rank receives the sum of its
part) and, after the update, an all-gather of the parameters: the same bytes on the wire, and only a part of the
optimizer's state on every rank (stage 1), and of the gradients too (stage 2, where every micro-batch's gradients are
scattered).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hvdlm.communication.all_reduce import AllReduceExchange
from hvdlm.config import CommunicationConfig
from hvdlm.parallel.flat_layout import FlatLayout
from hvdlm.protocols.group import Group, Handle
from hvdlm.protocols.types import Tensor


class ZeroExchange(AllReduceExchange):
    """Scatters the sums of gradients over the data axis and gathers what the ranks made of their parts."""

    def __init__(self, group: Group, options: CommunicationConfig, place: int, stage: int) -> None:
        super().__init__(group, options)
        self.part, self.parts, self.scatters_every = place, len(group.ranks), stage == 2

    def open(self, layout: FlatLayout, parameters: np.ndarray) -> None:
        """Learn the buckets."""
        self._buckets = range(len(layout.buckets))

    def start(self, bucket: Tensor, index: int) -> Handle:
        """Begin to sum the bucket; the handle's answer is this rank's part of the sum, ``[elements / ranks]``."""
        if self._before != 1.0:
            bucket = bucket * self._before
        return self.scaled(self._group.reduce_scatter_async(bucket, f"gradients.{index}"))

    def gather(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Return every bucket's parameters from this rank's updated parts of them."""
        started = [self._group.all_gather_async(parts[i], f"parameters.{i}") for i in self._buckets]
        return [handle.wait() for handle in started]
