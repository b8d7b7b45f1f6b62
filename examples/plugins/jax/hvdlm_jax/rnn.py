"""Recurrent models in JAX: the equations of ``hvdlm_language.rnn``, as functions of the parameters by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hvdlm_jax.dropout import dropout
from hvdlm_language.rnn import RNNSettings

Parameters = Mapping[str, jax.Array]
Carry = list[tuple[jax.Array, ...]]  # of every layer: h, and c of an LSTM, each [rows, hidden]


class RNN:
    """A recurrent language model."""

    def __init__(self, settings: RNNSettings, checkpointing: bool = False) -> None:
        self.s = settings
        self._cell = CELLS[settings.cell]
        self._training_layer = jax.checkpoint(self._layer, static_argnums=(1,)) if checkpointing else self._layer

    def hidden(self, p: Parameters, tokens: jax.Array, carry: Carry, key: jax.Array | None) -> tuple[jax.Array, Carry]:
        """Return ``[rows, time, embed]`` of ``tokens`` ``[rows, time]``, and the state after the last one.

        ``key``: seed of dropout; None outside of training.
        """
        keys = [None] * (self.s.layers + 1) if key is None else jax.random.split(key, self.s.layers + 1)
        x = dropout(p["embed.tokens"][tokens], self.s.dropout, keys[-1])
        layer = self._layer if key is None else self._training_layer
        after = []
        for i, state in enumerate(carry):
            x, last = layer(p, i, x, state)
            x = dropout(x, self.s.dropout, keys[i])
            after.append(last)
        return x, after

    def scores(self, p: Parameters, hidden: jax.Array) -> jax.Array:
        """Return logits ``[..., vocab]`` of hidden states ``[..., embed]``."""
        return hidden @ p["embed.tokens" if self.s.tie_embeddings else "head.weight"].T + p["head.bias"]

    def initial_carry(self, rows: int) -> Carry:
        """Return the state at the start of a text: zeros."""
        shape = (rows, self.s.width)
        # An array for each: a buffer that is donated to a compiled function may not be donated twice.
        return [tuple(jnp.zeros(shape, jnp.float32) for _ in range(self.s.carries)) for _ in range(self.s.layers)]

    def empty_cache(self, rows: int) -> Carry:
        """Return the cache of decoding: the state at the start."""
        return self.initial_carry(rows)

    def extend(self, p: Parameters, tokens: jax.Array, start: Any, cache: Carry) -> tuple[jax.Array, Carry]:
        """Return ``[rows, time, embed]`` of tokens that follow the state ``cache``, and the state after them."""
        return self.hidden(p, tokens, cache, None)

    def select(self, cache: Carry, rows: np.ndarray) -> Carry:
        """Return the cache of these rows."""
        return jax.tree.map(lambda t: t[rows], cache)

    def _layer(self, p: Parameters, i: int, x: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, Any]:
        """Return ``[rows, time, hidden]`` and the state after the last time step."""
        w, r = (p[f"layers.{i}.{k}.weight"] for k in ("input", "recurrent"))  # [inputs, gates, hidden]
        b_w, b_r = (p[f"layers.{i}.{k}.bias"] for k in ("input", "recurrent"))
        a = jnp.einsum("bti,igh->tgbh", x, w) + b_w[:, None]  # of all time steps at once: one large product

        def step(state: tuple[jax.Array, ...], a_t: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
            state = self._cell(a_t, jnp.einsum("bi,igh->gbh", state[0], r) + b_r[:, None], *state)
            return state, state[0]

        last, outputs = jax.lax.scan(step, state, a)
        return outputs.swapaxes(0, 1), last


def _tanh(a: jax.Array, b: jax.Array, h: jax.Array) -> tuple[jax.Array, ...]:
    return (jnp.tanh(a[0] + b[0]),)


def _gru(a: jax.Array, b: jax.Array, h: jax.Array) -> tuple[jax.Array, ...]:
    r, z = jax.nn.sigmoid(a[0] + b[0]), jax.nn.sigmoid(a[1] + b[1])
    n = jnp.tanh(a[2] + r * b[2])
    return ((1.0 - z) * n + z * h,)


def _lstm(a: jax.Array, b: jax.Array, h: jax.Array, c: jax.Array) -> tuple[jax.Array, ...]:
    i, f, g, o = a + b
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


CELLS: dict[str, Callable[..., tuple[jax.Array, ...]]] = {"rnn": _tanh, "gru": _gru, "lstm": _lstm}
