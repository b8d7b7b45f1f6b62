"""Learning-rate schedules: a linear warm-up, then constant, linear, cosine, inverse square root or steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from hvdlm.config import TrainConfig
from hvdlm.io.untrusted_input import shown

_OPTIONS = "steps learning_rate min_learning_rate schedule warmup decay_every decay_start decay_factor".split()


def changed_schedule(stored: Any, step: int, config: TrainConfig) -> str | None:
    """Return a sentence if a run that is resumed has another learning rate than it would have had.

    Args:
        stored: the configuration in the manifest of the checkpoint, untrusted.
        step: the step of the checkpoint.
        config: the options of the resumed run.
    """
    try:
        before = TrainConfig(**{name: stored["train"][name] for name in _OPTIONS})
        old, new = (make_schedule(train)(step) for train in (before, config))
    except (KeyError, TypeError, ValueError, ArithmeticError):
        return None  # of another version, or damaged
    if math.isclose(old, new, rel_tol=1e-6):
        return None
    options = [
        f"train.{name} is {getattr(config, name)} and was {shown(str(getattr(before, name)))}"
        for name in _OPTIONS
        if getattr(config, name) != getattr(before, name)
    ]
    return f"the learning rate after step {step} is {new:.3g} instead of {old:.3g}: {', '.join(options)}"


def make_schedule(config: TrainConfig) -> Callable[[int], float]:
    """Return ``rate(step)`` for step 0, 1, ...: the learning rate of the update that follows ``step`` updates.

    Warm-up of w steps: ``peak * (step + 1) / (w + 1)``. Then: constant; linear or cosine (Loshchilov and Hutter 2017,
    eq. 5) to ``min_learning_rate`` at the last step; inverse_sqrt: ``peak * sqrt(w / step)`` (Vaswani et al. 2017,
    eq. 3), never below the minimum; step: ``peak`` times ``decay_factor`` to the power of the decays so far.
    """
    peak, low = config.learning_rate, config.min_learning_rate
    warmup = round(config.warmup * config.steps) if 0 < config.warmup < 1 else int(config.warmup)
    remaining = max(1, config.steps - warmup)
    decay_start = config.decay_start or config.decay_every

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
        return peak

    return lambda step: peak * (step + 1) / (warmup + 1) if step < warmup else after(step)
