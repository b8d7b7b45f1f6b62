"""Dropout with an explicit seed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Return ``x`` with a share ``rate`` of its elements set to 0, the others scaled up; ``key`` None: unchanged."""
    if key is None or not rate:
        return x
    kept = jax.random.bernoulli(key, np.float32(1.0 - rate), x.shape)  # a Python float would be drawn in float64
    return jnp.where(kept, x / (1.0 - rate), 0.0)
