"""A pipeline stage at work in torch: executes a schedule, and passes activations and their gradients on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from hvdlm.parallel.axis_groups import Axes
from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm.parallel.stage_runner import PipelineStage
from hvdlm.protocols.types import Batch

Compute = Callable[[int, Batch, torch.Tensor | None], torch.Tensor]
"""(number, micro-batch, what the stage before made of it) -> what this stage makes of it; the last one's: a scalar."""


class Pipeline(PipelineStage):
    """One stage, on its device."""

    def __init__(self, model_shard: ModelShard, axes: Axes, schedule: str, rank: int, device: torch.device) -> None:
        super().__init__(model_shard, axes, schedule, rank)
        self._device = device

    def run(
        self, micro_batches: Sequence[Batch], width: int, compute: Compute, before_backward: Callable[[bool], None]
    ) -> None:
        """Do all passes of a step; ``before_backward`` is told whether a backward pass is the last."""
        kept: dict[int, tuple[torch.Tensor | None, torch.Tensor]] = {}
        for action, received in self.passes(micro_batches, width):
            n = action.micro_batch
            if action.kind == "forward":
                x = None if received is None else received.requires_grad_()
                kept[n] = (x, compute(n, micro_batches[n], x))
                if not self._stage.last:
                    self.pass_on(action, kept[n][1].detach())
            else:
                x, y = kept.pop(n)
                before_backward(n + 1 == len(micro_batches))
                torch.autograd.backward(y, received)
                if x is not None:
                    self.pass_on(action, x.grad)

    def empty(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return a tensor that can be received into."""
        return torch.empty(shape, device=self._device)

    def packed(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return ``tensor`` as it travels."""
        return tensor.contiguous()

    def unpacked(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return what has travelled as it is computed with."""
        return tensor
