"""GPT in TensorFlow: the equations of ``hvdlm.models.gpt``, in the same order.

A rank computes its pipeline stage's layers, and of a layer its tensor rank's heads and part of the MLP: its parameters
are already cut, so that only what joins the parts is said here (``collectives``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from hvdlm.errors import HvdlmError
from hvdlm.models.gpt import GPTSettings
from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm_tensorflow.collectives import Collectives

Layer = Mapping[str, tf.Tensor]
Dropout = Callable[[tf.Tensor, int], tf.Tensor]
# What computes outside of the matrix products, on a rank's own positions where they are shared.
_BETWEEN: tuple[str, ...] = ("attention_norm.scale", "attention_norm.bias", "attention.output.bias")
_BETWEEN += ("mlp_norm.scale", "mlp_norm.bias", "mlp.down.bias")
_KV = ("attention.key.", "attention.value.")


class Cache(NamedTuple):
    """Keys and values of a rank's layers ``[layers, 2, rows, kv_heads, context, head]``, up to ``length`` (int32)."""

    store: tf.Tensor
    length: tf.Tensor


class GPT:
    """A decoder-only Transformer over parameters by name."""

    def __init__(self, settings: GPTSettings, model_shard: ModelShard, collectives: Collectives) -> None:
        self.s, self.dtype, self._model_shard, self._collectives = settings, tf.float32, model_shard, collectives
        # Fewer key-value heads than ranks: all ranks hold all, each uses the one that its query heads need.
        self._few = settings.kv_heads % model_shard.tensor > 0
        self._kv_heads = 1 if self._few else settings.kv_heads // model_shard.tensor
        self._cos, self._sin = _angles(settings)

    def bind(self, parameters: Mapping[str, tf.Tensor]) -> None:
        """Take these tensors as parameters."""
        self._p = {n: tf.cast(t, self.dtype) if _is_matrix(n) else t for n, t in parameters.items()}
        prefixes = [f"layers.{i}." for i in self._model_shard.layers]
        self._layers = [{n[len(p) :]: t for n, t in self._p.items() if n.startswith(p)} for p in prefixes]
        self._head: Any = self._p.get("embed.tokens" if self.s.tie_embeddings else "head.weight")
        few = [name for name in self._layers[0] if self._few and name.startswith(_KV)]
        # What all ranks hold, but whose gradient each has only a part of: {positions shared: names}.
        self._partial = {False: few, True: few + [name for name in _BETWEEN if name in self._layers[0]]}

    def hidden(
        self, tokens: tf.Tensor, x: tf.Tensor | None, carry: Any, training: bool, checkpointing: bool, seed: tf.Tensor
    ) -> tuple[tf.Tensor, Any]:
        """Return what this stage makes of ``tokens`` ``[rows, time]``: ``[rows, time, embed]``; nothing is carried.

        ``x``: what the stage before made of them, in the first stage None; of the positions, perhaps only this rank's.
        """
        rate = self.s.dropout if training else 0.0

        def dropout(x: tf.Tensor, place: int) -> tf.Tensor:
            if not rate:
                return x
            return tf.nn.experimental.stateless_dropout(x, rate, seed=seed + tf.constant([0, place]))

        c = self._collectives.over(tokens.shape[1])
        x = self._embed(tokens, 0, dropout, c) if x is None else x
        mask = _causal(tokens.shape[1])
        for number, layer in zip(self._model_shard.layers, self._layers, strict=True):
            names = list(layer)

            def compute(x: tf.Tensor, *tensors: tf.Tensor, i: int = number, names: list[str] = names) -> tf.Tensor:
                return self._layer(x, dict(zip(names, tensors, strict=True)), mask, i, dropout, c)

            compute = tf.recompute_grad(compute) if checkpointing and training else compute
            x = compute(x, *layer.values())
        return self._finish(x, c), carry

    def _finish(self, x: tf.Tensor, c: Collectives) -> tf.Tensor:
        if not self._model_shard.stage.last:
            return x
        names = [n for n in self._p if n.startswith("final_norm.")] if c.sequence else []
        return c.enter(self._norm(x, c.shared(self._p, names, "final"), "final_norm"), "head")

    def scores(self, hidden: tf.Tensor) -> tf.Tensor:
        """Return logits ``[..., vocab]`` of hidden states ``[..., embed]``: this rank's part of the vocabulary."""
        flat = tf.matmul(tf.reshape(hidden, [-1, self.s.width]), self._head, transpose_b=True)
        return tf.reshape(flat, tf.concat([tf.shape(hidden)[:-1], [self._head.shape[0]]], 0))

    def cache(self, rows: int) -> tf.Tensor:
        """Return what training carries: nothing."""
        return tf.zeros(())

    def decoding_cache(self, rows: int) -> Cache:
        """Return an empty key-value cache."""
        s = self.s
        shape = (len(self._model_shard.layers), 2, rows, self._kv_heads, s.context, s.head_width)
        return Cache(tf.zeros(shape, self.dtype), tf.constant(0))

    def check_length(self, cache: Cache, more: int) -> None:
        """Refuse more tokens than the context holds."""
        if int(cache.length) + more > self.s.context:
            raise HvdlmError(f"{int(cache.length) + more} tokens are more than the context of {self.s.context}.")

    def extend(self, tokens: tf.Tensor, x: tf.Tensor | None, cache: Cache) -> tuple[tf.Tensor, Cache]:
        """Return what this stage makes of tokens that follow what the cache holds; see ``hidden``."""
        c = self._collectives.alone()
        start, time = cache.length, tf.shape(tokens)[1]
        x = self._embed(tokens, start, _no_dropout, c) if x is None else x
        # Place t of the new tokens sees keys 0 .. start + t.
        seen = tf.range(self.s.context)[None, :] <= start + tf.range(time)[:, None]
        mask = tf.where(seen, 0.0, -np.inf)  # [time, context]
        stores = []
        for index, (number, layer) in enumerate(zip(self._model_shard.layers, self._layers, strict=True)):
            store = cache.store[index]

            def remember(k: tf.Tensor, v: tf.Tensor, store: tf.Tensor = store) -> tuple[tf.Tensor, tf.Tensor]:
                new = tf.stack([k, v])  # [2, rows, kv_heads, time, head]
                after = store[:, :, :, start + time :]
                whole = tf.concat([store[:, :, :, :start], new, after], 3)
                stores.append(tf.ensure_shape(whole, store.shape))
                return whole[0], whole[1]

            x = self._layer(x, layer, mask, number, _no_dropout, c, start, remember)
        return self._finish(x, c), Cache(tf.stack(stores), start + time)

    def _embed(self, tokens: tf.Tensor, start: Any, dropout: Dropout, c: Collectives) -> tf.Tensor:
        x = c.leave(c.embedding(tokens, self._p["embed.tokens"]), "embed")
        if self.s.positions == "learned":
            p = c.shared(self._p, ["embed.positions"] if c.sequence else [], "positions")
            time = tf.shape(x)[1]
            first = start + c.index * time if c.sequence else start
            x += p["embed.positions"][first : first + time]
        return dropout(x, 0)

    def _layer(
        self,
        x: tf.Tensor,
        p: Layer,
        mask: tf.Tensor,
        number: int,
        dropout: Dropout,
        c: Collectives,
        start: Any = 0,
        remember: Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]] | None = None,
    ) -> tf.Tensor:
        p = c.shared(p, self._partial[c.sequence], str(number))
        h = c.enter(self._norm(x, p, "attention_norm"), f"{number}.attention")
        a = _joined(self._attention(h, p, mask, start, remember), p, "attention.output", c, f"{number}.attention")
        x += dropout(a, 2 * number + 1)
        h = c.enter(self._norm(x, p, "mlp_norm"), f"{number}.mlp")
        return x + dropout(_joined(self._mlp(h, p), p, "mlp.down", c, f"{number}.mlp"), 2 * number + 2)

    def _attention(self, h: tf.Tensor, p: Layer, mask: tf.Tensor, start: Any, remember: Any) -> tf.Tensor:
        """Return what this rank's heads found, ``[rows, time, heads * head / ranks]``."""
        p = self._own_head(p) if self._few else p
        rows, time = tf.shape(h)[0], h.shape[1] if h.shape[1] is not None else tf.shape(h)[1]
        q, k, v = (self._heads(_linear(h, p, f"attention.{n}"), rows, time) for n in ("query", "key", "value"))
        if self.s.positions == "rotary":
            q, k = self._rotate(q, start, time), self._rotate(k, start, time)
        if remember:
            k, v = remember(k, v)
        group = q.shape[1] // k.shape[1]
        if group > 1:
            k, v = tf.repeat(k, group, 1), tf.repeat(v, group, 1)
        scores = tf.matmul(q * self.s.head_width**-0.5, k, transpose_b=True)  # [rows, heads, time, keys]
        shares = tf.cast(tf.nn.softmax(tf.cast(scores, tf.float32) + mask), self.dtype)
        a = tf.transpose(tf.matmul(shares, v), [0, 2, 1, 3])
        return tf.reshape(a, [rows, time, q.shape[1] * self.s.head_width])

    def _own_head(self, p: Layer) -> Layer:
        """Return ``p`` with the columns of the one key-value head that this rank's query heads use."""
        first = self._model_shard.index * self.s.kv_heads // self._model_shard.tensor * self.s.head_width
        own = slice(first, first + self.s.head_width)
        return {n: t[..., own] if n.startswith(_KV) else t for n, t in p.items()}

    def _heads(self, x: tf.Tensor, rows: Any, time: Any) -> tf.Tensor:
        heads = x.shape[-1] // self.s.head_width
        return tf.transpose(tf.reshape(x, [rows, time, heads, self.s.head_width]), [0, 2, 1, 3])

    def _rotate(self, x: tf.Tensor, start: Any, time: Any) -> tf.Tensor:
        cos, sin = (tf.constant(t)[start : start + time] for t in (self._cos, self._sin))  # [time, head]
        half = self.s.head_width // 2
        turned = tf.concat([-x[..., half:], x[..., :half]], -1)
        return tf.cast(tf.cast(x, tf.float32) * cos + tf.cast(turned, tf.float32) * sin, x.dtype)

    def _mlp(self, h: tf.Tensor, p: Layer) -> tf.Tensor:
        """Return this rank's part of the inner layer, ``[rows, time, mlp / ranks]``."""
        up = _linear(h, p, "mlp.up")
        if self.s.activation == "swiglu":
            return tf.nn.silu(_linear(h, p, "mlp.gate")) * up
        return tf.nn.gelu(up, approximate=True)

    def _norm(self, x: tf.Tensor, p: Layer, name: str) -> tf.Tensor:
        wide = tf.cast(x, tf.float32)
        if self.s.norm == "layernorm":
            wide -= tf.reduce_mean(wide, -1, keepdims=True)
        variance = tf.reduce_mean(tf.square(wide), -1, keepdims=True)
        wide *= tf.math.rsqrt(variance + self.s.norm_epsilon) * p[f"{name}.scale"]
        bias = p.get(f"{name}.bias")
        return tf.cast(wide if bias is None else wide + bias, self.dtype)

    def carry_arrays(self, carry: Any) -> dict[str, Any]:
        """Return nothing: a Transformer carries nothing from batch to batch."""
        return {}

    def carry_tensors(self, arrays: Mapping[str, Any], micro: int | None) -> dict[int, Any]:
        """Return nothing."""
        return {}


def _is_matrix(name: str) -> bool:
    return "norm" not in name


def _no_dropout(x: tf.Tensor, place: int) -> tf.Tensor:
    return x


def _causal(time: int) -> tf.Tensor:
    """Return float32 ``[time, time]``: 0 where a query may look, minus infinity where not."""
    return tf.constant(np.triu(np.full((time, time), -np.inf, np.float32), 1))


def _angles(s: GPTSettings) -> tuple[np.ndarray, np.ndarray]:
    """Return cosines and sines, float32 ``[context, head]``."""
    power = np.arange(0, s.head_width, 2, dtype=np.float64) / s.head_width
    angle = np.outer(np.arange(s.context, dtype=np.float64), s.rotary_base**-power)
    angle = np.concatenate([angle, angle], -1)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def _joined(x: tf.Tensor, p: Layer, name: str, c: Collectives, label: str) -> tf.Tensor:
    """Return the product of ranks' parts ``[rows, time, inputs / ranks]`` with a weight of which each has its rows."""
    if c.size == 1:
        return _linear(x, p, name)
    found, bias = c.leave(_linear(x, {f"{name}.weight": p[f"{name}.weight"]}, name), label), p.get(f"{name}.bias")
    return found if bias is None else found + bias


def _linear(x: tf.Tensor, p: Layer, name: str) -> tf.Tensor:
    weight, bias = p[f"{name}.weight"], p.get(f"{name}.bias")
    flat = tf.matmul(tf.reshape(x, [-1, weight.shape[0]]), weight)
    flat = flat if bias is None else tf.nn.bias_add(flat, bias)
    return tf.reshape(flat, tf.concat([tf.shape(x)[:-1], [weight.shape[1]]], 0))
