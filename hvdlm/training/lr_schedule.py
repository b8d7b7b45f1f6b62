"""Learning-rate schedules: a linear warm-up, then constant, linear, cosine, inverse square root, steps or cooldown."""

from __future__ import annotations

import math
from collections.abc import Callable

from hvdlm.config import TrainConfig


def make_schedule(config: TrainConfig, own: Callable[[int], float] | None = None) -> Callable[[int], float]:
    """Return ``rate(step)`` for step 0, 1, ...: the learning rate of the update that follows ``step`` updates.

    Warm-up of w steps: ``peak * (step + 1) / (w + 1)``. Then: constant; linear or cosine (Loshchilov and Hutter 2017,
    eq. 5) to the minimum, ``min_learning_rate_value``, at the last step; inverse_sqrt: ``peak * sqrt(w / step)``
    (Vaswani et al. 2017, eq. 3), never below the minimum; step: ``peak`` times ``decay_factor`` to the power of the
    decays so far; wsd: constant up to the last ``cooldown`` steps (warmup-stable-decay, Hu et al. 2024, section 4.2),
    in which the rate falls to the minimum linearly or as ``1 - sqrt(done)`` (Hägele et al. 2024, eq. 2); ``own``: that
    of a plugin, in place of these.
    """
    peak, low = config.learning_rate, config.min_learning_rate_value
    warmup = warmup_steps(config)
    remaining = max(1, config.steps - warmup)
    decay_start = config.decay_start or config.decay_every
    cooldown = min(max(1, _count(config.cooldown, config.steps)), remaining)

    def after(step: int) -> float:
        done = min(1.0, (step - warmup) / remaining)
        if config.schedule == "linear":
            return low + (peak - low) * (1.0 - done)
        if config.schedule == "cosine":
            return low + (peak - low) * 0.5 * (1.0 + math.cos(math.pi * done))
        if config.schedule == "inverse_sqrt":
            return max(low, peak * math.sqrt(max(warmup, 1) / max(step, warmup, 1)))
        if config.schedule == "step":
            return peak * config.decay_factor ** max(0, (step - warmup - decay_start) // config.decay_every + 1)
        if config.schedule == "wsd":
            done = min(1.0, max(0.0, (step - config.steps + cooldown) / cooldown))
            return low + (peak - low) * (1.0 - (done if config.cooldown_shape == "linear" else math.sqrt(done)))
        return peak

    later = own or after
    return lambda step: peak * (step + 1) / (warmup + 1) if step < warmup else later(step)


def warmup_steps(config: TrainConfig) -> int:
    """Return the steps of the linear warm-up, which ``config.warmup`` gives as such or, below 1, as their share."""
    return _count(config.warmup, config.steps)


def _count(length: float, steps: int) -> int:
    """Return a number of steps, which below 1 is a share of all ``steps``."""
    return round(length * steps) if 0 < length < 1 else int(length)
