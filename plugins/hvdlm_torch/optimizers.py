"""Update rules on flat vectors: PyTorch's fused kernels, with weight decay on the masked elements.

AdamW (Loshchilov and Hutter 2019, algorithm 2), SGD with momentum (Sutskever et al. 2013) and Nesterov's variant,
Adagrad (Duchi et al. 2011), by the equations in PyTorch's documentation; the TensorFlow plugin computes the same.
They are torch.optim's functions, not its classes: those import torch's compiler, a third of the time of a start.
"""

from __future__ import annotations

import torch
from torch.optim.adagrad import adagrad
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from hvdlm.config import TrainConfig
from hvdlm.protocols.optimizer import Optimizer
from hvdlm.protocols.state_dict import optimizer_state


class FlatOptimizer:
    """One update rule over a flat float32 parameter vector and its gradient ``[size]``."""

    def __init__(
        self,
        config: TrainConfig,
        parameter: torch.Tensor,
        gradient: torch.Tensor,
        mask: torch.Tensor,
        own: Optimizer | None = None,
    ) -> None:
        self._config = config
        self._parameter = parameter
        self._gradient = gradient
        self._mask = mask
        self._own = own
        self._decoupled = own.decoupled if own else config.optimizer == "adamw"
        self._state = {kind: torch.zeros_like(parameter) for kind in optimizer_state(config, own)}
        self._step = torch.zeros((), dtype=torch.float32, device=parameter.device)

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """The rule's state by kind: flat float32 ``[size]``."""
        return self._state

    @torch.no_grad()
    def update(self, learning_rate: float, step: int) -> None:
        """Apply the gradient as update number ``step`` (from 0)."""
        c = self._config
        if c.weight_decay and self._decoupled:  # decoupled
            self._parameter.addcmul_(self._parameter, self._mask, value=-learning_rate * c.weight_decay)
        elif c.weight_decay:  # L2 regularisation: part of the gradient
            self._gradient.addcmul_(self._parameter, self._mask, value=c.weight_decay)
        self._step.fill_(step)
        if self._own:
            self._apply_own(self._own, learning_rate)
        else:
            self._apply_rule(learning_rate)

    def _apply_own(self, rule: Optimizer, learning_rate: float) -> None:
        """Apply a plugin's rule."""
        rate = torch.full_like(self._step, learning_rate)
        parameter, state = rule.update(self._parameter, self._gradient, self._state, rate, self._step)
        self._parameter.copy_(parameter)
        for name, tensor in self._state.items():
            tensor.copy_(state[name])

    def _apply_rule(self, lr: float) -> None:
        c, parameters, gradients, steps = self._config, [self._parameter], [self._gradient], [self._step]
        state = [[tensor] for tensor in self._state.values()]
        # No weight decay here: it has been applied already, to the masked elements only.
        common = {"lr": lr, "weight_decay": 0.0, "maximize": False}
        if c.optimizer == "adamw":
            settings = {"beta1": c.beta1, "beta2": c.beta2, "eps": c.epsilon, "amsgrad": False}
            adamw(parameters, gradients, *state, [], steps, fused=True, **settings, **common)
        elif c.optimizer == "sgd":
            velocity = state[0] if state else [None]
            settings = {"momentum": c.momentum, "dampening": 0.0, "nesterov": c.nesterov and c.momentum > 0}
            sgd(parameters, gradients, velocity, fused=True, **settings, **common)
        else:
            adagrad(parameters, gradients, *state, steps, lr_decay=0.0, eps=c.epsilon, **common)
