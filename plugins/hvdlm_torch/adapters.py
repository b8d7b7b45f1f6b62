"""What a model is bound to where only low-rank adapters are trained: the equations of ``hvdlm.models.lora``.

An adapted weight is a leaf of its own, of what it adds up to: summed once per step, and its gradient, as soon as the
backward pass has it, becomes that of the two small matrices and is forgotten. Models don't notice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from hvdlm.parallel.sharded_state import ShardedState


@dataclass
class _Sum:
    """An adapted weight as matrices: ``frozen + factor * down @ up``, which ``leaf`` holds."""

    frozen: torch.Tensor  # [inputs, outputs]
    down: torch.nn.Parameter  # [inputs, rank]
    up: torch.nn.Parameter  # [rank, outputs, or gates and hidden]
    factor: float
    leaf: torch.nn.Parameter  # the weight's own shape

    @torch.no_grad()
    def add(self) -> None:
        out = self.leaf.detach().flatten(1)
        torch.addmm(self.frozen, self.down, self.up.flatten(1), alpha=self.factor, out=out)

    @torch.no_grad()
    def pass_on(self, leaf: torch.Tensor) -> None:
        """Turn the gradient of the sum, which has arrived, into those of ``down`` and ``up``."""
        assert leaf.grad is not None
        gradient, leaf.grad = leaf.grad.flatten(1), None
        _accumulate(self.down, gradient @ self.up.flatten(1).t(), self.factor)
        _accumulate(self.up, self.down.t() @ gradient, self.factor)


class Adapters:
    """The weights that a model computes with, from the parameters that are trained: the same where nothing is frozen.

    Attributes:
        bound: the weights by name.
        leaves: of every parameter, the leaf that the backward pass reaches.
    """

    def __init__(self, state: ShardedState, parameters: Mapping[str, torch.nn.Parameter], device: torch.device) -> None:
        self.bound: dict[str, torch.Tensor] = {}
        self.leaves, self._sums = dict(parameters), []
        for name, array in state.frozen():
            self.bound[name] = torch.from_numpy(array).to(device)
        self.bound = self.bound or dict(parameters)
        for one in state.spec.adapters:
            frozen, down, up = self.bound[one.weight], parameters[one.down], parameters[one.up]
            leaf = torch.nn.Parameter(torch.empty_like(frozen))
            found = _Sum(frozen.flatten(1), down, up, one.factor, leaf)
            leaf.register_post_accumulate_grad_hook(found.pass_on)  # before those that send gradients on their way
            self.bound[one.weight] = self.leaves[one.down] = self.leaves[one.up] = leaf
            self._sums.append(found)
        self.add()

    def add(self) -> None:
        """Add the adapters, which have changed, to what is frozen."""
        for one in self._sums:
            one.add()


def _accumulate(parameter: torch.nn.Parameter, gradient: torch.Tensor, factor: float) -> None:
    gradient = gradient.view_as(parameter)
    if parameter.grad is None:
        parameter.grad = gradient.mul_(factor)
    else:
        parameter.grad.add_(gradient, alpha=factor)
