"""A pipeline stage in PyTorch: follows a schedule of passes, and sends activations and their gradients on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from hvdlm.parallel.pipeline_schedules import Action
from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm.protocols.types import Batch
from hvdlm_language.axis_groups import Axes
from hvdlm_language.stage_runner import PipelineStage
from hvdlm_torch.profiling import named_range

Compute = Callable[[Action, Batch, torch.Tensor | None], torch.Tensor]
"""(action, micro-batch, the stage before's activations) -> this stage's activations; in the last stage, the loss."""


class Pipeline(PipelineStage):
    """The passes of one stage, which computes between its layers in float32 and sends activations in ``dtype``."""

    def __init__(
        self, model_shard: ModelShard, axes: Axes, schedule: str, rank: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(model_shard, axes, schedule, rank)
        self._device = device
        self._dtype = dtype

    def run(
        self, micro_batches: Sequence[Batch], width: int, compute: Compute, before_backward: Callable[[bool], None]
    ) -> None:
        """Do all passes of a step; ``before_backward(last)`` is called before each backward pass."""
        # Of forward passes whose backward pass is still to come: the input, the output.
        graphs: dict[tuple[int, int], tuple[torch.Tensor | None, torch.Tensor]] = {}
        for action, received in self.passes(micro_batches, width):
            number, key = action.micro_batch, (action.chunk, action.micro_batch)
            if action.kind == "forward":
                x = None if received is None else received.requires_grad_()
                y = compute(action, micro_batches[number], x)
                graphs[key] = (x, y)
                if not self._chunks[action.chunk].last:
                    self.pass_on(action, y.detach())
            else:
                x, y = graphs.pop(key)
                before_backward(number + 1 == len(micro_batches))
                # received: the gradient of y; None where y is the loss.
                with named_range("backward"):
                    torch.autograd.backward(y, received)
                if x is not None:
                    self.pass_on(action, x.grad)

    def empty(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return a tensor to receive into."""
        return torch.empty(shape, dtype=self._dtype, device=self._device)

    def packed(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return ``tensor`` in the form in which it is sent."""
        return tensor.to(self._dtype).contiguous()

    def unpacked(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a received tensor in the form in which it is computed with."""
        return tensor.float()
