"""Recurrent models in TensorFlow: the equations of ``hvdlm.models.rnn``, unrolled over time in the graph.

Where tensor ranks share a layer, each computes its hidden units, and after every time step they tell each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from hvdlm.models.rnn import RNNSettings
from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm_tensorflow.collectives import Collectives

Carry = list[tuple[tf.Tensor, ...]]  # of every layer: h, and c of an LSTM, each [rows, hidden]
Dropout = Callable[[tf.Tensor, int], tf.Tensor]


class RNN:
    """A recurrent language model over parameters by name."""

    def __init__(self, settings: RNNSettings, model_shard: ModelShard, collectives: Collectives) -> None:
        self.s, self.dtype, self._model_shard, self._c = settings, tf.float32, model_shard, collectives
        cells: dict[str, Callable[..., Any]] = {"rnn": _tanh, "gru": _gru, "lstm": _lstm}
        self._cell = cells[settings.cell]

    def bind(self, parameters: Mapping[str, tf.Tensor]) -> None:
        """Take these tensors as parameters."""
        self._p = {n: tf.cast(t, self.dtype) for n, t in parameters.items()}
        self._head: Any = self._p.get("embed.tokens" if self.s.tie_embeddings else "head.weight")

    def hidden(
        self, tokens: tf.Tensor, x: tf.Tensor | None, carry: Carry, training: bool, checkpointing: bool, seed: tf.Tensor
    ) -> tuple[tf.Tensor, Carry]:
        """Return what this stage makes of ``tokens``, ``[rows, time, embed]``, and its state after the last one.

        ``x``: what the stage before made of them, in the first stage None. The state is cut from the graph.
        """
        rate = self.s.dropout if training else 0.0

        def dropout(x: tf.Tensor, place: int) -> tf.Tensor:
            if not rate:
                return x
            return tf.nn.experimental.stateless_dropout(x, rate, seed=seed + tf.constant([0, place]))

        if x is None:
            x = self._c.enter(self._c.leave(self._c.embedding(tokens, self._p["embed.tokens"]), "embed"), "embed")
            x = dropout(x, 0)
        after: Carry = []
        for number, state in zip(self._model_shard.layers, carry, strict=True):
            parts = [self._p[f"layers.{number}.{n}.{k}"] for n in ("input", "recurrent") for k in ("weight", "bias")]
            layer: Callable[..., Any] = partial(self._layer, number)
            layer = tf.recompute_grad(layer) if checkpointing and training else layer
            x, *last = layer(x, *parts, *state)
            after.append(tuple(tf.stop_gradient(tf.cast(t, tf.float32)) for t in last))
            x = dropout(x, number + 1)
        return x, after

    def scores(self, hidden: tf.Tensor) -> tf.Tensor:
        """Return logits ``[..., vocab]`` of hidden states ``[..., embed]``: this rank's part of the vocabulary."""
        flat = tf.matmul(tf.reshape(hidden, [-1, self.s.width]), self._head, transpose_b=True) + self._p["head.bias"]
        return tf.reshape(flat, tf.concat([tf.shape(hidden)[:-1], [self._head.shape[0]]], 0))

    def cache(self, rows: int) -> Carry:
        """Return the zero state of this rank's layers and hidden units."""
        zeros = tf.zeros((rows, self.s.width // self._model_shard.tensor))
        return [(zeros,) * self.s.carries for _ in self._model_shard.layers]

    decoding_cache = cache

    def check_length(self, cache: Carry, more: int) -> None:
        """Refuse nothing: a recurrent model has no longest context."""

    def extend(self, tokens: tf.Tensor, x: tf.Tensor | None, cache: Carry) -> tuple[tf.Tensor, Carry]:
        """Return what this stage makes of tokens that follow the state ``cache``; see ``hidden``."""
        return self.hidden(tokens, x, cache, False, False, tf.constant([0, 0]))

    def _layer(
        self, number: int, x: tf.Tensor, w: Any, b: Any, recurrent: Any, recurrent_bias: Any, *state: Any
    ) -> Any:
        """Return ``[rows, time, hidden]`` of all ranks and this rank's state ``[rows, hidden / ranks]``."""
        width, units = self.s.width, self.s.gates * (self.s.width // self._model_shard.tensor)
        rows = tf.shape(x)[0]
        # All input parts at once: one large product instead of one per token.
        a = tf.matmul(tf.reshape(x, [-1, width]), tf.reshape(w, [width, -1])) + tf.reshape(b, [-1])
        a = tf.reshape(a, [rows, -1, units])  # [rows, time, gates * hidden / ranks]
        recurrent, recurrent_bias = tf.reshape(recurrent, [width, -1]), tf.reshape(recurrent_bias, [-1])
        state = tuple(tf.cast(t, self.dtype) for t in state)

        def joined(h: tf.Tensor) -> tf.Tensor:
            return h if self._c.size == 1 else self._c.join(h, f"{number}.hidden")

        def step(before: tuple[Any, ...], now: Any) -> tuple[Any, ...]:
            """Return (h of all ranks, state of this one) of the next time step from those of the one before."""
            after = self._cell(now, tf.matmul(before[0], recurrent) + recurrent_bias, *before[1:])
            return (joined(after[0]), *after)

        # No gradient flows into the batch before: cut here, so that none is summed over ranks for it.
        both = (state[0] if self._c.size == 1 else tf.stop_gradient(joined(state[0])), *state)
        if x.shape[1] is not None:
            outputs = []
            for now in tf.unstack(a, x.shape[1], 1):
                both = step(both, now)
                outputs.append(both[0])
            return (tf.stack(outputs, 1), *both[1:])
        states = tf.scan(step, tf.transpose(a, [1, 0, 2]), both)
        return (tf.transpose(states[0], [1, 0, 2]), *(s[-1] for s in states[1:]))

    def carry_arrays(self, carry: Carry) -> dict[str, np.ndarray]:
        """Return {layer.which: float32 ``[rows, hidden / ranks]``} of a carried state."""
        return {
            f"{i}.{j}": t.numpy()
            for i, state in zip(self._model_shard.layers, carry, strict=True)
            for j, t in enumerate(state)
        }

    def carry_tensors(self, arrays: Mapping[str, np.ndarray], micro: int | None) -> dict[int, Carry]:
        """Return the carried state of every micro-batch of ``micro`` rows from that of all rows."""
        if not arrays:
            return {}
        rows = len(next(iter(arrays.values())))
        cuts = range(0, rows, micro or rows)
        return {number: self._slice(arrays, start, start + (micro or rows)) for number, start in enumerate(cuts)}

    def _slice(self, arrays: Mapping[str, np.ndarray], start: int, stop: int) -> Carry:
        return [
            tuple(tf.constant(arrays[f"{i}.{j}"][start:stop]) for j in range(self.s.carries))
            for i in self._model_shard.layers
        ]


def _tanh(a: tf.Tensor, b: tf.Tensor, h: tf.Tensor) -> tuple[tf.Tensor]:
    return (tf.tanh(a + b),)


def _gru(a: tf.Tensor, b: tf.Tensor, h: tf.Tensor) -> tuple[tf.Tensor]:
    (a_r, a_z, a_n), (b_r, b_z, b_n) = tf.split(a, 3, -1), tf.split(b, 3, -1)
    r, z = tf.sigmoid(a_r + b_r), tf.sigmoid(a_z + b_z)
    n = tf.tanh(a_n + r * b_n)
    return ((1.0 - z) * n + z * h,)


def _lstm(a: tf.Tensor, b: tf.Tensor, h: tf.Tensor, c: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    i, f, g, o = tf.split(a + b, 4, -1)
    c = tf.sigmoid(f) * c + tf.sigmoid(i) * tf.tanh(g)
    return tf.sigmoid(o) * tf.tanh(c), c
