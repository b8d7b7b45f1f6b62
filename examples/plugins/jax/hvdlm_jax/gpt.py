"""GPT in JAX: the equations of ``hvdlm_language.gpt``, in the same order, as functions of the parameters by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hvdlm_jax.dropout import dropout
from hvdlm_language.gpt import GPTSettings, rotary_tables

Parameters = Mapping[str, jax.Array]


class Cache(NamedTuple):
    """Keys and values of the tokens so far, each ``[layers, rows, kv_heads, context, head]``."""

    keys: jax.Array
    values: jax.Array


class GPT:
    """A decoder-only Transformer."""

    def __init__(self, settings: GPTSettings, checkpointing: bool = False) -> None:
        self.s = settings
        self._tables = rotary_tables(settings) if settings.positions == "rotary" else ()
        self._training_layer = jax.checkpoint(self._layer, static_argnums=(1,)) if checkpointing else self._layer

    def hidden(self, p: Parameters, tokens: jax.Array, carry: Any, key: jax.Array | None) -> tuple[jax.Array, Any]:
        """Return ``[rows, time, embed]`` of ``tokens`` ``[rows, time]``, and ``carry`` unchanged.

        ``key``: seed of dropout; None outside of training.
        """
        keys = [None] * (self.s.layers + 1) if key is None else jax.random.split(key, self.s.layers + 1)
        x = self._embed(p, tokens, 0, keys[-1])
        time = np.arange(tokens.shape[1])
        mask = self._seen(time[:, None] - time)
        layer = self._layer if key is None else self._training_layer
        for i in range(self.s.layers):
            x = layer(p, i, x, mask, keys[i])
        return self._norm(p, "final_norm", x), carry

    def scores(self, p: Parameters, hidden: jax.Array) -> jax.Array:
        """Return logits ``[..., vocab]`` of hidden states ``[..., embed]``."""
        return hidden @ p["embed.tokens" if self.s.tie_embeddings else "head.weight"].T

    def initial_carry(self, rows: int) -> None:
        """Return the state at the start of a text: a Transformer carries none."""

    def empty_cache(self, rows: int) -> Cache:
        """Return a cache without tokens."""
        shape = (self.s.layers, rows, self.s.kv_heads, self.s.context, self.s.head_width)
        return Cache(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))

    def extend(self, p: Parameters, tokens: jax.Array, start: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Return ``[rows, time, embed]`` of tokens from position ``start`` on, and the grown cache."""
        x = self._embed(p, tokens, start, None)
        positions = start + np.arange(tokens.shape[1])
        mask = self._seen(positions[:, None] - np.arange(self.s.context))  # [time, context]
        for i in range(self.s.layers):
            h = self._norm(p, f"layers.{i}.attention_norm", x)
            q, k, v = self._heads(p, i, h, start)
            at = (i, 0, 0, start, 0)
            keys = lax.dynamic_update_slice(cache.keys, k[None], at)
            cache = Cache(keys, lax.dynamic_update_slice(cache.values, v[None], at))
            before, x = x, x + self._attention(p, i, q, cache.keys[i], cache.values[i], mask)
            h = before if self.s.parallel_residual else x
            x = x + self._mlp(p, i, self._norm(p, f"layers.{i}.mlp_norm", h))
        return self._norm(p, "final_norm", x), cache

    def select(self, cache: Cache, rows: np.ndarray) -> Cache:
        """Return the cache of these rows."""
        return Cache(cache.keys[:, rows], cache.values[:, rows])

    def _seen(self, distance: Any) -> Any:
        """Return whether queries see keys that lie ``distance`` positions before them."""
        window = self.s.local_window
        return (distance >= 0) & (distance < window) if window else distance >= 0

    def _embed(self, p: Parameters, tokens: jax.Array, start: Any, key: jax.Array | None) -> jax.Array:
        x = p["embed.tokens"][tokens]
        x = x * self.s.width**0.5 if self.s.scale_embeddings else x
        if self.s.positions == "learned":
            x = x + lax.dynamic_slice_in_dim(p["embed.positions"], start, tokens.shape[1])
        return dropout(x, self.s.dropout, key)

    def _layer(self, p: Parameters, i: int, x: jax.Array, mask: Any, key: jax.Array | None) -> jax.Array:
        first, second = (None, None) if key is None else jax.random.split(key)
        h = self._norm(p, f"layers.{i}.attention_norm", x)
        before, x = x, x + dropout(self._attention(p, i, *self._heads(p, i, h, 0), mask), self.s.dropout, first)
        m = self._mlp(p, i, self._norm(p, f"layers.{i}.mlp_norm", before if self.s.parallel_residual else x))
        return x + dropout(m, self.s.dropout, second)

    def _heads(self, p: Parameters, i: int, h: jax.Array, start: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return queries, keys and values, each ``[rows, heads or kv_heads, time, head]``."""
        rows, time, _ = h.shape
        q, k, v = (_linear(p, f"layers.{i}.attention.{name}", h) for name in ("query", "key", "value"))
        q, k, v = (t.reshape(rows, time, -1, self.s.head_width).swapaxes(1, 2) for t in (q, k, v))
        if self.s.qk_norm:
            q = self._rms_norm(p, f"layers.{i}.attention.query_norm", q)
            k = self._rms_norm(p, f"layers.{i}.attention.key_norm", k)
        if self.s.positions == "rotary":
            q, k = self._rotate(q, start), self._rotate(k, start)
        return q, k, v

    def _attention(self, p: Parameters, i: int, q: jax.Array, k: jax.Array, v: jax.Array, mask: Any) -> jax.Array:
        """Return ``[rows, time, embed]``; ``mask`` ``[queries, keys]`` is true where a query may see a key."""
        rows, _, time, head = q.shape
        q = q.reshape(rows, self.s.kv_heads, -1, time, head)  # the queries that share a key-value head
        scores = jnp.einsum("rkgth,rksh->rkgts", q, k) / head**0.5
        a = jnp.einsum("rkgts,rksh->rkgth", jax.nn.softmax(jnp.where(mask, scores, -jnp.inf)), v)
        a = a.reshape(rows, -1, time, head).swapaxes(1, 2).reshape(rows, time, -1)
        return _linear(p, f"layers.{i}.attention.output", a)

    def _rotate(self, x: jax.Array, start: Any) -> jax.Array:
        cos, sin = (lax.dynamic_slice_in_dim(jnp.asarray(t), start, x.shape[2]) for t in self._tables)
        x, rest = x[..., : self.s.rotary_width], x[..., self.s.rotary_width :]
        half = x.shape[-1] // 2
        x = x * cos + jnp.concatenate([-x[..., half:], x[..., :half]], -1) * sin
        return jnp.concatenate([x, rest], -1) if rest.shape[-1] else x

    def _mlp(self, p: Parameters, i: int, h: jax.Array) -> jax.Array:
        up = _linear(p, f"layers.{i}.mlp.up", h)
        if self.s.gated:
            gate = _linear(p, f"layers.{i}.mlp.gate", h)
            gate = jax.nn.silu(gate) if self.s.activation == "swiglu" else jax.nn.gelu(gate, approximate=True)
            return _linear(p, f"layers.{i}.mlp.down", gate * up)
        return _linear(p, f"layers.{i}.mlp.down", jax.nn.gelu(up, approximate=self.s.activation == "gelu"))

    def _norm(self, p: Parameters, name: str, x: jax.Array) -> jax.Array:
        if self.s.norm == "layernorm":
            x = x - x.mean(-1, keepdims=True)
        x = self._rms_norm(p, name, x)
        return x + p[f"{name}.bias"] if f"{name}.bias" in p else x

    def _rms_norm(self, p: Parameters, name: str, x: jax.Array) -> jax.Array:
        return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + self.s.norm_epsilon) * p[f"{name}.scale"]


def _linear(p: Parameters, name: str, x: jax.Array) -> jax.Array:
    product = x @ p[f"{name}.weight"]
    return product + p[f"{name}.bias"] if f"{name}.bias" in p else product
