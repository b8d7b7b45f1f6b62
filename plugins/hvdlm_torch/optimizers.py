"""Update rules on flat vectors: torch's own fused optimizers, with weight decay on the masked elements.

AdamW (Loshchilov and Hutter 2019, algorithm 2), SGD with momentum (Sutskever et al. 2013) and Nesterov's variant,
Adagrad (Duchi et al. 2011), in the form in which torch writes them; the TensorFlow plugin follows the same equations.
"""

from __future__ import annotations

import torch

from hvdlm.config import TrainConfig

# What each rule remembers: {the name in checkpoints: torch's own}.
KINDS = {
    "adamw": {"first_moment": "exp_avg", "second_moment": "exp_avg_sq"},
    "sgd": {"momentum": "momentum_buffer"},
    "adagrad": {"sum_of_squares": "sum"},
}


class FlatOptimizer:
    """One update rule over a flat float32 parameter vector and its gradient ``[size]``."""

    def __init__(
        self, config: TrainConfig, parameter: torch.Tensor, gradient: torch.Tensor, mask: torch.Tensor
    ) -> None:
        self._config, self._mask = config, mask
        self._parameter = torch.nn.Parameter(parameter)
        self._parameter.grad = gradient
        self._rule = _make_rule(config, self._parameter)
        kinds = {} if config.optimizer == "sgd" and not config.momentum else KINDS[config.optimizer]
        self._memory = {kind: torch.zeros_like(parameter) for kind in kinds}
        self._step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        self._rule.state[self._parameter] = {kinds[kind]: tensor for kind, tensor in self._memory.items()}
        if config.optimizer != "sgd":
            self._rule.state[self._parameter]["step"] = self._step

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
            self._parameter.grad.addcmul_(self._parameter, self._mask, value=c.weight_decay)
        self._step.fill_(step)
        self._rule.param_groups[0]["lr"] = learning_rate
        self._rule.step()


def _make_rule(c: TrainConfig, parameter: torch.nn.Parameter) -> torch.optim.Optimizer:
    if c.optimizer == "adamw":
        betas = (c.beta1, c.beta2)
        return torch.optim.AdamW([parameter], lr=0.0, betas=betas, eps=c.epsilon, weight_decay=0.0, fused=True)
    if c.optimizer == "sgd":
        nesterov = c.nesterov and c.momentum > 0
        return torch.optim.SGD([parameter], lr=0.0, momentum=c.momentum, nesterov=nesterov, fused=True)
    return torch.optim.Adagrad([parameter], lr=0.0, eps=c.epsilon)
