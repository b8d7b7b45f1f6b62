"""Update rules on flat vectors, inside of a compiled function; the equations of PyTorch's optimizers.

AdamW (Loshchilov and Hutter 2019, algorithm 2), SGD with momentum and Nesterov's variant (Sutskever et al. 2013), and
Adagrad (Duchi et al. 2011). Weight decay applies where ``mask`` is 1.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from hvdlm.config import TrainConfig
from hvdlm.protocols.optimizer import Optimizer
from hvdlm.protocols.state_dict import optimizer_state

Memory = dict[str, jax.Array]


def initial_memory(config: TrainConfig, size: int, own: Optimizer | None = None) -> Memory:
    """Return the rule's state before the first step, by kind, each float32 ``[size]``; ``own``: a plugin's rule."""
    return {kind: jnp.zeros(size, jnp.float32) for kind in optimizer_state(config, own)}


def rates(config: TrainConfig, learning_rate: float, step: int, factor: float) -> np.ndarray:
    """Return what changes from step to step, as one array, so that no step is traced anew.

    Those are ``factor`` of the gradient, the learning rate, AdamW's bias corrections of update ``step``, and ``step``
    (from 0).
    """
    corrections = [1.0 - config.beta1 ** (step + 1), 1.0 - config.beta2 ** (step + 1)]
    return np.array([factor, learning_rate, *corrections, step], np.float32)


def update(
    config: TrainConfig,
    x: jax.Array,
    memory: Memory,
    gradient: jax.Array,
    mask: jax.Array,
    rates: jax.Array,
    own: Optimizer | None = None,
) -> tuple[jax.Array, Memory]:
    """Return the updated parameters and state, each ``[size]``, from the summed ``gradient`` ``[size]``."""
    factor, lr, correction1, correction2, step = rates
    g = gradient * factor
    decay = config.weight_decay * mask * x
    if own is not None:
        x, g = (x - lr * decay, g) if own.decoupled else (x, g + decay)
        return own.update(x, g, memory, lr, step)
    if config.optimizer == "adamw":
        x = x - lr * decay  # decoupled
        m = config.beta1 * memory["first_moment"] + (1.0 - config.beta1) * g
        v = config.beta2 * memory["second_moment"] + (1.0 - config.beta2) * g * g
        x = x - lr / correction1 * m / (jnp.sqrt(v) / jnp.sqrt(correction2) + config.epsilon)
        return x, {"first_moment": m, "second_moment": v}
    g = g + decay  # L2 regularisation: part of the gradient
    if config.optimizer == "adagrad":
        squares = memory["sum_of_squares"] + g * g
        return x - lr * g / (jnp.sqrt(squares) + config.epsilon), {"sum_of_squares": squares}
    if not memory:
        return x - lr * g, memory
    velocity = config.momentum * memory["momentum"] + g
    return x - lr * (g + config.momentum * velocity if config.nesterov else velocity), {"momentum": velocity}
