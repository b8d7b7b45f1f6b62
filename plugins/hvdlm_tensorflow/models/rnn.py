"""Recurrent models in TensorFlow: the equations of ``hvdlm.models.rnn``, unrolled over time in the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from hvdlm.models.rnn import RNNSettings

Carry = list[tuple[tf.Tensor, ...]]  # of every layer: h, and c of an LSTM, each [rows, hidden]
Dropout = Callable[[tf.Tensor, int], tf.Tensor]


class RNN:
    """A recurrent language model over parameters by name."""

    def __init__(self, settings: RNNSettings) -> None:
        self.s, self.dtype = settings, tf.float32
        cells: dict[str, Callable[..., Any]] = {"rnn": _tanh, "gru": _gru, "lstm": _lstm}
        self._cell = cells[settings.cell]

    def bind(self, parameters: Mapping[str, tf.Tensor]) -> None:
        """Take these tensors as parameters."""
        self._p = {n: tf.cast(t, self.dtype) for n, t in parameters.items()}
        self._head = self._p["embed.tokens" if self.s.tie_embeddings else "head.weight"]

    def hidden(
        self, tokens: tf.Tensor, carry: Carry, training: bool, checkpointing: bool, seed: tf.Tensor
    ) -> tuple[tf.Tensor, Carry]:
        """Return hidden states ``[rows, time, embed]`` and the state after the last token, cut from the graph."""
        rate = self.s.dropout if training else 0.0

        def dropout(x: tf.Tensor, place: int) -> tf.Tensor:
            if not rate:
                return x
            return tf.nn.experimental.stateless_dropout(x, rate, seed=seed + tf.constant([0, place]))

        x = dropout(tf.gather(self._p["embed.tokens"], tokens), 0)
        after: Carry = []
        for index, state in enumerate(carry):
            parts = [self._p[f"layers.{index}.{n}.{k}"] for n in ("input", "recurrent") for k in ("weight", "bias")]
            layer = tf.recompute_grad(self._layer) if checkpointing and training else self._layer
            x, *last = layer(x, *parts, *state)
            after.append(tuple(tf.stop_gradient(tf.cast(t, tf.float32)) for t in last))
            x = dropout(x, index + 1)
        return x, after

    def scores(self, hidden: tf.Tensor) -> tf.Tensor:
        """Return logits ``[..., vocab]`` of hidden states ``[..., embed]``."""
        flat = tf.matmul(tf.reshape(hidden, [-1, self.s.width]), self._head, transpose_b=True) + self._p["head.bias"]
        return tf.reshape(flat, tf.concat([tf.shape(hidden)[:-1], [self.s.vocab]], 0))

    def cache(self, rows: int) -> Carry:
        """Return the zero state."""
        zeros = tf.zeros((rows, self.s.width))
        return [(zeros,) * self.s.carries for _ in range(self.s.layers)]

    decoding_cache = cache

    def check_length(self, cache: Carry, more: int) -> None:
        """Refuse nothing: a recurrent model has no longest context."""

    def extend(self, tokens: tf.Tensor, cache: Carry) -> tuple[tf.Tensor, Carry]:
        """Return hidden states of tokens that follow the state ``cache``."""
        return self.hidden(tokens, cache, False, False, tf.constant([0, 0]))

    def _layer(self, x: tf.Tensor, w: Any, b: Any, recurrent: Any, recurrent_bias: Any, *state: Any) -> Any:
        width, gates = self.s.width, self.s.gates
        rows = tf.shape(x)[0]
        # All input parts at once: one large product instead of one per token.
        a = tf.matmul(tf.reshape(x, [-1, width]), tf.reshape(w, [width, -1])) + tf.reshape(b, [-1])
        a = tf.reshape(a, [rows, -1, gates * width])  # [rows, time, gates * hidden]
        recurrent, recurrent_bias = tf.reshape(recurrent, [width, -1]), tf.reshape(recurrent_bias, [-1])
        state = tuple(tf.cast(t, self.dtype) for t in state)

        def step(state: tuple[Any, ...], now: Any) -> tuple[Any, ...]:
            return self._cell(now, tf.matmul(state[0], recurrent) + recurrent_bias, *state)

        if x.shape[1] is not None:
            outputs = []
            for now in tf.unstack(a, x.shape[1], 1):
                state = step(state, now)
                outputs.append(state[0])
            return (tf.stack(outputs, 1), *state)
        states = tf.scan(step, tf.transpose(a, [1, 0, 2]), state)
        return (tf.transpose(states[0], [1, 0, 2]), *(s[-1] for s in states))

    def carry_arrays(self, carry: Carry) -> dict[str, np.ndarray]:
        """Return {layer.which: float32 ``[rows, hidden]``} of a carried state."""
        return {f"{i}.{j}": t.numpy() for i, state in enumerate(carry) for j, t in enumerate(state)}

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
            for i in range(self.s.layers)
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
