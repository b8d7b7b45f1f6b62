"""Update rules on flat vectors: PyTorch's fused kernels, with a weight decay and a learning rate for every element.

AdamW (Loshchilov and Hutter 2019, algorithm 2), SGD with momentum (Sutskever et al. 2013) and Nesterov's variant,
Adagrad (Duchi et al. 2011), by the equations in PyTorch's documentation; the TensorFlow plugin computes the same.
They are the kernels of torch.optim, not its classes: those import torch's compiler, a third of the time of a start.

Whether an update is applied is decided on the device, so that the host doesn't wait for the gradient's norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hvdlm.config import TrainConfig
from hvdlm.parallel.parameter_groups import UpdateRates
from hvdlm.protocols.optimizer import Optimizer
from hvdlm.protocols.state_dict import optimizer_state

_COPIED = 8  # the kernel updates up to a 1/8 of the elements, those without weight decay, a second time in copies


class FlatOptimizer:
    """One update rule over a flat float32 parameter vector and its gradient ``[size]``.

    ``rates``: weight decay and factor of the learning rate, of every element. ``own``: a plugin's rule. ``state``:
    where the rule's state is kept, in the order of its kinds; None: in vectors of its own.
    """

    def __init__(
        self,
        config: TrainConfig,
        parameter: torch.Tensor,
        gradient: torch.Tensor,
        rates: UpdateRates,
        own: Optimizer | None = None,
        state: Sequence[torch.Tensor] | None = None,
    ) -> None:
        self._config = config
        self._parameter = parameter
        self._gradient = gradient
        self._own = own
        kinds = optimizer_state(config, own)
        self._state = dict(zip(kinds, state or [torch.zeros_like(parameter) for _ in kinds], strict=True))
        self._count = torch.zeros((), dtype=torch.float32, device=parameter.device)
        self._fused = own is None and config.optimizer != "adagrad"  # whose kernel PyTorch has for CPUs only
        device, nonzero = parameter.device, rates.decays != 0
        # The kernels take one weight decay. Few elements without any (biases, norms) are updated in copies; for more of
        # them, or several decays, there is a vector.
        self._decay = float(rates.decays.max(initial=0.0))
        exempt = np.flatnonzero(~nonzero) if self._decay else np.zeros(0, np.int64)
        uniform = self._fused and bool((rates.decays[nonzero] == np.float32(self._decay)).all())
        self._decays: torch.Tensor | None = None
        if self._decay and not (uniform and _COPIED * len(exempt) <= len(parameter)):
            self._decays, self._decay, exempt = torch.from_numpy(rates.decays).to(device), 0.0, exempt[:0]
        self._exempt = torch.from_numpy(exempt).to(device)
        self._scales = None if rates.scales is None else torch.from_numpy(rates.scales).to(device)

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """The rule's state by kind: flat float32 ``[size]``."""
        return self._state

    @torch.no_grad()
    def update(self, learning_rate: float, step: int, factor: torch.Tensor, applied: torch.Tensor) -> None:
        """Apply the gradient times ``factor`` as update number ``step`` (from 0), or change nothing.

        ``factor`` (float64) and ``applied`` (bool) are scalars on the device. The gradient is overwritten.
        """
        before = None if self._scales is None else self._parameter.clone()
        if self._fused:
            self._apply_fused(learning_rate, step, factor, applied)
        else:
            self._apply_whole(learning_rate, step, factor.float(), applied)
        if before is not None and self._scales is not None:  # no rule's state depends on the rate
            torch.lerp(before, self._parameter, self._scales, out=self._parameter)

    def _apply_fused(self, lr: float, step: int, factor: torch.Tensor, applied: torch.Tensor) -> None:
        """Apply a rule whose kernel divides the gradient, decays weights, and stops where ``found_inf`` is 1."""
        # A CPU computes scalars at once: there, dividing by 1, which is a pass over the gradient, can be left out.
        divisor = None if factor.is_cpu and factor == 1.0 else factor.reciprocal().float()
        if self._decays is not None and self._config.optimizer == "adamw":  # decoupled
            shrinkage = self._decays * (applied * -lr)
            self._parameter.addcmul_(self._parameter, shrinkage)
        elif self._decays is not None:  # L2 regularisation: part of the gradient
            self._gradient.mul_(factor).addcmul_(self._parameter, self._decays)
            divisor = None
        common = {"lr": lr, "maximize": False, "grad_scale": divisor, "found_inf": applied.logical_not().float()}
        vectors = [self._parameter, self._gradient, *self._state.values()]
        # The few weights that don't decay (biases, norms) are updated in copies. The kernel would take ranges between
        # them, too, but starts its threads for every one: 13 times as long on 2 threads that others share.
        exempt = [vector[self._exempt] for vector in vectors] if len(self._exempt) else []
        self._count.fill_(step + 1)
        self._launch(vectors, weight_decay=self._decay, **common)
        if exempt:
            self._launch(exempt, weight_decay=0.0, **common)
        for vector, values in zip(vectors, exempt, strict=False):
            vector[self._exempt] = values

    def _launch(self, vectors: list[torch.Tensor], **common: Any) -> None:
        """Apply the rule's kernel to parameters, gradient and state, each ``[n]``."""
        c, (parameters, gradients, *state) = self._config, [[vector] for vector in vectors]
        if c.optimizer == "adamw":
            settings = {"beta1": c.beta1, "beta2": c.beta2, "eps": c.epsilon, "amsgrad": False}
            torch._fused_adamw_(parameters, gradients, *state, [], [self._count], **settings, **common)
            return
        settings = {"momentum": c.momentum_value, "dampening": 0.0, "nesterov": c.nesterov and c.momentum_value > 0}
        velocity = state[0] if state else []
        torch._fused_sgd_(parameters, gradients, velocity, is_first_step=False, **settings, **common)

    def _apply_whole(self, lr: float, step: int, factor: torch.Tensor, applied: torch.Tensor) -> None:
        """Compute new vectors by Adagrad or a plugin's rule, and store them where ``applied``."""
        c, parameter, gradient = self._config, self._parameter, self._gradient.mul_(factor)
        if self._decays is not None and self._own and self._own.decoupled:
            parameter = torch.addcmul(parameter, parameter, self._decays, value=-lr)
        elif self._decays is not None:  # L2 regularisation: part of the gradient
            gradient.addcmul_(parameter, self._decays)
        if self._own:
            rate, count = torch.full_like(self._count, lr), self._count.fill_(step)
            parameter, state = self._own.update(parameter, gradient, self._state, rate, count)
        else:
            ((kind, total),) = self._state.items()
            state = {kind: torch.addcmul(total, gradient, gradient)}
            parameter = torch.addcdiv(parameter, gradient, state[kind].sqrt().add_(c.epsilon), value=-lr)
        torch.where(applied, parameter, self._parameter, out=self._parameter)
        for kind, old in self._state.items():
            torch.where(applied, state[kind], old, out=old)
