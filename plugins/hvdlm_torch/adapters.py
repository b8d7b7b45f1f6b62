"""The weights of a model of which only low-rank adapters are trained: the equations of ``hvdlm.models.lora``.

An adapted weight, the sum of the frozen weight and its adapter, is a leaf of autograd that is computed once per step.
As soon as the backward pass has its gradient, the gradients of the adapter's two matrices are derived from it, and it
is freed. The models' code is the same with and without adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from hvdlm.parallel.sharded_state import ShardedState


class Adapters:
    """The weights that a model computes with, from the trained parameters: the same where nothing is frozen.

    Attributes:
        bound: the weights by name.
        leaves: of every trained parameter, the tensor whose gradient the backward pass computes.
    """

    def __init__(self, state: ShardedState, parameters: Mapping[str, torch.nn.Parameter], device: torch.device) -> None:
        self.leaves = dict(parameters)
        self._weights: list[_AdaptedWeight] = []
        self._frozen = {name: torch.from_numpy(array).to(device) for name, array in state.initial_frozen()}
        self.bound = dict(self._frozen) or dict(parameters)
        for adapter in state.spec.adapters:
            frozen, down, up = self.bound[adapter.weight], parameters[adapter.down], parameters[adapter.up]
            leaf = torch.nn.Parameter(torch.empty_like(frozen))
            weight = _AdaptedWeight(frozen.flatten(1), down, up, adapter.factor, leaf)
            # Before the hooks of gradients.py, which then find the gradients of down and up in place.
            leaf.register_post_accumulate_grad_hook(weight.derive_gradients)
            self.bound[adapter.weight] = self.leaves[adapter.down] = self.leaves[adapter.up] = leaf
            self._weights.append(weight)
        self.add()

    def add(self) -> None:
        """Recompute the adapted weights, after the adapters have changed."""
        for weight in self._weights:
            weight.add()

    def frozen_arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the name, ``frozen/NAME``, and the present values of every frozen weight."""
        return ((f"frozen/{name}", tensor.cpu().numpy()) for name, tensor in self._frozen.items())


@dataclass
class _AdaptedWeight:
    """An adapted weight: ``leaf`` holds ``frozen + factor * down @ up``."""

    frozen: torch.Tensor  # [inputs, outputs]
    down: torch.nn.Parameter  # [inputs, rank]
    up: torch.nn.Parameter  # [rank, outputs]; of a recurrent layer [rank, gates, hidden]
    factor: float
    leaf: torch.nn.Parameter  # the weight's shape

    @torch.no_grad()
    def add(self) -> None:
        """Recompute the sum, in place."""
        out = self.leaf.detach().flatten(1)
        torch.addmm(self.frozen, self.down, self.up.flatten(1), alpha=self.factor, out=out)

    @torch.no_grad()
    def derive_gradients(self, leaf: torch.Tensor) -> None:
        """Add to the gradients of ``down`` and ``up`` what follows from that of the sum, G: G up^T and down^T G."""
        assert leaf.grad is not None
        gradient, leaf.grad = leaf.grad.flatten(1), None
        _accumulate(self.down, gradient @ self.up.flatten(1).t(), self.factor)
        _accumulate(self.up, self.down.t() @ gradient, self.factor)


def _accumulate(parameter: torch.nn.Parameter, gradient: torch.Tensor, factor: float) -> None:
    gradient = gradient.view_as(parameter)
    if parameter.grad is None:  # ZeRO-2 has scattered the gradient of the micro-batch before
        parameter.grad = gradient.mul_(factor)
    else:
        parameter.grad.add_(gradient.mul_(factor))  # not alpha=, which would round only the sum: other bits
