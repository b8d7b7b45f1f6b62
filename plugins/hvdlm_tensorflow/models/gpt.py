"""GPT in TensorFlow: the equations of ``hvdlm.models.gpt``, in the same order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from hvdlm.interfaces import HvdlmError
from hvdlm.models.gpt import GPTSettings

Layer = Mapping[str, tf.Tensor]
Dropout = Callable[[tf.Tensor, int], tf.Tensor]


class Cache(NamedTuple):
    """Keys and values ``[layers, 2, rows, kv_heads, context, head]``, filled up to ``length`` (int32)."""

    store: tf.Tensor
    length: tf.Tensor


class GPT:
    """A decoder-only Transformer over parameters by name."""

    def __init__(self, settings: GPTSettings) -> None:
        self.s, self.dtype = settings, tf.float32
        self._cos, self._sin = _angles(settings)

    def bind(self, parameters: Mapping[str, tf.Tensor]) -> None:
        """Take these tensors as parameters."""
        self._p = {n: tf.cast(t, self.dtype) if _is_matrix(n) else t for n, t in parameters.items()}
        prefixes = [f"layers.{i}." for i in range(self.s.layers)]
        self._layers = [{n[len(p) :]: t for n, t in self._p.items() if n.startswith(p)} for p in prefixes]
        self._head = self._p["embed.tokens" if self.s.tie_embeddings else "head.weight"]

    def hidden(
        self, tokens: tf.Tensor, carry: Any, training: bool, checkpointing: bool, seed: tf.Tensor
    ) -> tuple[tf.Tensor, Any]:
        """Return the last hidden states ``[rows, time, embed]`` of ``tokens`` ``[rows, time]``; nothing is carried."""
        rate = self.s.dropout if training else 0.0

        def dropout(x: tf.Tensor, place: int) -> tf.Tensor:
            if not rate:
                return x
            return tf.nn.experimental.stateless_dropout(x, rate, seed=seed + tf.constant([0, place]))

        x = self._embed(tokens, 0, dropout)
        mask = _causal(tokens.shape[1])
        for index, layer in enumerate(self._layers):
            names = list(layer)

            def compute(x: tf.Tensor, *tensors: tf.Tensor, i: int = index, names: list[str] = names) -> tf.Tensor:
                return self._layer(x, dict(zip(names, tensors, strict=True)), mask, 2 * i + 1, dropout)

            compute = tf.recompute_grad(compute) if checkpointing and training else compute
            x = compute(x, *layer.values())
        return self._norm(x, self._p, "final_norm"), carry

    def scores(self, hidden: tf.Tensor) -> tf.Tensor:
        """Return logits ``[..., vocab]`` of hidden states ``[..., embed]``."""
        flat = tf.matmul(tf.reshape(hidden, [-1, self.s.width]), self._head, transpose_b=True)
        return tf.reshape(flat, tf.concat([tf.shape(hidden)[:-1], [self.s.vocab]], 0))

    def cache(self, rows: int) -> tf.Tensor:
        """Return what training carries: nothing."""
        return tf.zeros(())

    def decoding_cache(self, rows: int) -> Cache:
        """Return an empty key-value cache."""
        s = self.s
        shape = (s.layers, 2, rows, s.kv_heads, s.context, s.head_width)
        return Cache(tf.zeros(shape, self.dtype), tf.constant(0))

    def check_length(self, cache: Cache, more: int) -> None:
        """Refuse more tokens than the context holds."""
        if int(cache.length) + more > self.s.context:
            raise HvdlmError(f"{int(cache.length) + more} tokens are more than the context of {self.s.context}.")

    def extend(self, tokens: tf.Tensor, cache: Cache) -> tuple[tf.Tensor, Cache]:
        """Return hidden states ``[rows, time, embed]`` of tokens that follow what the cache holds."""
        start, time = cache.length, tf.shape(tokens)[1]
        x = self._embed(tokens, start, _no_dropout)
        # Place t of the new tokens sees keys 0 .. start + t.
        seen = tf.range(self.s.context)[None, :] <= start + tf.range(time)[:, None]
        mask = tf.where(seen, 0.0, -np.inf)  # [time, context]
        stores = []
        for index, layer in enumerate(self._layers):
            store = cache.store[index]

            def remember(k: tf.Tensor, v: tf.Tensor, store: tf.Tensor = store) -> tuple[tf.Tensor, tf.Tensor]:
                new = tf.stack([k, v])  # [2, rows, kv_heads, time, head]
                after = store[:, :, :, start + time :]
                whole = tf.concat([store[:, :, :, :start], new, after], 3)
                stores.append(tf.ensure_shape(whole, store.shape))
                return whole[0], whole[1]

            x = self._layer(x, layer, mask, 0, _no_dropout, start, remember)
        return self._norm(x, self._p, "final_norm"), Cache(tf.stack(stores), start + time)

    def _embed(self, tokens: tf.Tensor, start: Any, dropout: Dropout) -> tf.Tensor:
        x = tf.gather(self._p["embed.tokens"], tokens)
        if self.s.positions == "learned":
            x += self._p["embed.positions"][start : start + tf.shape(tokens)[1]]
        return dropout(x, 0)

    def _layer(
        self,
        x: tf.Tensor,
        p: Layer,
        mask: tf.Tensor,
        place: int,
        dropout: Dropout,
        start: Any = 0,
        remember: Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]] | None = None,
    ) -> tf.Tensor:
        h = self._norm(x, p, "attention_norm")
        x += dropout(self._attention(h, p, mask, start, remember), place)
        h = self._norm(x, p, "mlp_norm")
        return x + dropout(self._mlp(h, p), place + 1)

    def _attention(self, h: tf.Tensor, p: Layer, mask: tf.Tensor, start: Any, remember: Any) -> tf.Tensor:
        rows, time = tf.shape(h)[0], h.shape[1] if h.shape[1] is not None else tf.shape(h)[1]
        q, k, v = (self._heads(_linear(h, p, f"attention.{n}"), rows, time) for n in ("query", "key", "value"))
        if self.s.positions == "rotary":
            q, k = self._rotate(q, start, time), self._rotate(k, start, time)
        if remember:
            k, v = remember(k, v)
        group = self.s.heads // self.s.kv_heads
        if group > 1:
            k, v = tf.repeat(k, group, 1), tf.repeat(v, group, 1)
        scores = tf.matmul(q * self.s.head_width**-0.5, k, transpose_b=True)  # [rows, heads, time, keys]
        shares = tf.cast(tf.nn.softmax(tf.cast(scores, tf.float32) + mask), self.dtype)
        a = tf.transpose(tf.matmul(shares, v), [0, 2, 1, 3])
        return _linear(tf.reshape(a, [rows, time, self.s.width]), p, "attention.output")

    def _heads(self, x: tf.Tensor, rows: Any, time: Any) -> tf.Tensor:
        heads = x.shape[-1] // self.s.head_width
        return tf.transpose(tf.reshape(x, [rows, time, heads, self.s.head_width]), [0, 2, 1, 3])

    def _rotate(self, x: tf.Tensor, start: Any, time: Any) -> tf.Tensor:
        cos, sin = (tf.constant(t)[start : start + time] for t in (self._cos, self._sin))  # [time, head]
        half = self.s.head_width // 2
        turned = tf.concat([-x[..., half:], x[..., :half]], -1)
        return tf.cast(tf.cast(x, tf.float32) * cos + tf.cast(turned, tf.float32) * sin, x.dtype)

    def _mlp(self, h: tf.Tensor, p: Layer) -> tf.Tensor:
        up = _linear(h, p, "mlp.up")
        if self.s.activation == "swiglu":
            return _linear(tf.nn.silu(_linear(h, p, "mlp.gate")) * up, p, "mlp.down")
        return _linear(tf.nn.gelu(up, approximate=True), p, "mlp.down")

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


def _linear(x: tf.Tensor, p: Layer, name: str) -> tf.Tensor:
    weight, bias = p[f"{name}.weight"], p.get(f"{name}.bias")
    flat = tf.matmul(tf.reshape(x, [-1, weight.shape[0]]), weight)
    flat = flat if bias is None else tf.nn.bias_add(flat, bias)
    return tf.reshape(flat, tf.concat([tf.shape(x)[:-1], [weight.shape[1]]], 0))
