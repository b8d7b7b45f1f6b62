"""Update rules on flat vectors: torch's own fused kernels, with weight decay on the masked elements.

AdamW (Loshchilov and Hutter 2019, algorithm 2), SGD with momentum (Sutskever et al. 2013) and Nesterov's variant,
Adagrad (Duchi et al. 2011), in the form in which torch writes them; the TensorFlow plugin follows the same equations.
They are torch.optim's functions, not its classes: those load torch's compiler, a third of a start.
"""

from __future__ import annotations

import torch
from torch.optim.adagrad import adagrad
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from hvdlm.config import TrainConfig

# What each rule remembers, by its name in checkpoints, in the order in which torch takes it.
KINDS = {
    "adamw": ("first_moment", "second_moment"),
    "sgd": ("momentum",),
    "adagrad": ("sum_of_squares",),
}


class FlatOptimizer:
    """One update rule over a flat float32 parameter vector and its gradient ``[size]``."""

    def __init__(
        self, config: TrainConfig, parameter: torch.Tensor, gradient: torch.Tensor, mask: torch.Tensor
    ) -> None:
        self._config, self._mask = config, mask
        self._parameter, self._gradient = parameter, gradient
        kinds = () if config.optimizer == "sgd" and not config.momentum else KINDS[config.optimizer]
        self._memory = {kind: torch.zeros_like(parameter) for kind in kinds}
        self._step = torch.zeros((), dtype=torch.float32, device=parameter.device)

    @property
    def memory(self) -> dict[str, torch.Tensor]:
        """What the rule remembers, by kind: flat float32 ``[size]``."""
        return self._memory

    @torch.no_grad()
    def update(self, learning_rate: float, step: int) -> None:
        """Apply the gradient as update number ``step`` (from 0)."""
        c = self._config
        if c.weight_decay and c.optimizer == "adamw":
            self._parameter.addcmul_(self._parameter, self._mask, value=-learning_rate * c.weight_decay)
        elif c.weight_decay:
            self._gradient.addcmul_(self._parameter, self._mask, value=c.weight_decay)
        self._step.fill_(step)
        self._rule(learning_rate)

    def _rule(self, lr: float) -> None:
        c, held = self._config, [self._parameter]
        gradient, step, memory = [self._gradient], [self._step], [[tensor] for tensor in self._memory.values()]
        same = {"lr": lr, "weight_decay": 0.0, "maximize": False}
        if c.optimizer == "adamw":
            betas = {"beta1": c.beta1, "beta2": c.beta2}
            adamw(held, gradient, *memory, [], step, fused=True, amsgrad=False, eps=c.epsilon, **betas, **same)
        elif c.optimizer == "sgd":
            nesterov, velocity = c.nesterov and c.momentum > 0, memory[0] if memory else [None]
            rest = {"momentum": c.momentum, "dampening": 0.0, "nesterov": nesterov, **same}
            sgd(held, gradient, velocity, fused=True, **rest)
        else:
            adagrad(held, gradient, *memory, step, lr_decay=0.0, eps=c.epsilon, **same)
