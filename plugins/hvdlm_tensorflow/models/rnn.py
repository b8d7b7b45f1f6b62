"""Recurrent models in TensorFlow: the equations of ``hvdlm_language.rnn``, unrolled over time in the graph.

Tensor ranks that share a layer each compute some of its hidden units, and gather all after every time step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm_language.rnn import RNNSettings
from hvdlm_tensorflow.collectives import Collectives
from hvdlm_tensorflow.shapes import sizes

Carry = list[tuple[tf.Tensor, ...]]  # of every layer: h, and c of an LSTM, each [rows, hidden / ranks]


class RNN:
    """A recurrent language model over parameters by name.

    Attributes:
        head: of the last stage: the table ``[vocab, embed]`` of ``scores``, and its bias.
    """

    def __init__(self, settings: RNNSettings, model_shard: ModelShard, collectives: Collectives) -> None:
        self.s = settings
        self.dtype = tf.float32
        self._model_shard = model_shard
        self._c = collectives
        cells: dict[str, Callable[..., Any]] = {"rnn": _tanh, "gru": _gru, "lstm": _lstm}
        self._cell = cells[settings.cell]

    def bind(self, parameters: Mapping[str, tf.Tensor]) -> None:
        """Use these tensors as parameters, in the precision of the run."""
        self._p = {n: tf.cast(t, self.dtype) for n, t in parameters.items()}
        table: Any = self._p.get("embed.tokens" if self.s.tie_embeddings else "head.weight")
        self.head = table, self._p.get("head.bias")

    def hidden(
        self, tokens: tf.Tensor, x: tf.Tensor | None, carry: Carry, training: bool, checkpointing: bool, seed: tf.Tensor
    ) -> tuple[tf.Tensor, Carry]:
        """Return this stage's activations ``[rows, time, embed]`` of ``tokens``, and its state after the last one.

        ``x``: those of the stage before, in the first stage None. No gradient flows through the state.
        """
        rate = self.s.dropout if training else 0.0

        def dropout(x: tf.Tensor, number: int) -> tf.Tensor:
            if not rate:
                return x
            return tf.nn.experimental.stateless_dropout(x, rate, seed=seed + tf.constant([0, number]))

        if x is None:
            x = self._c.enter(self._c.leave(self._c.embedding(tokens, self._p["embed.tokens"]), "embed"), "embed")
            x = dropout(x, 0)
        after: Carry = []
        for number, state in zip(self._model_shard.layers, carry, strict=True):
            names = [f"layers.{number}.{n}.{k}" for n in ("input", "recurrent") for k in ("weight", "bias")]
            # Parameters are arguments, because gradients flow to arguments only where a layer is recomputed.
            layer: Callable[..., Any] = partial(self._layer, number)
            layer = tf.recompute_grad(layer) if checkpointing and training else layer
            x, *last = layer(x, *(self._p[name] for name in names), *state)
            after.append(tuple(tf.stop_gradient(tf.cast(t, tf.float32)) for t in last))
            x = dropout(x, number + 1)
        return x, after

    def scores(self, hidden: tf.Tensor) -> tf.Tensor:
        """Return logits ``[..., vocab]`` of hidden states ``[..., embed]``: this rank's range of the vocabulary."""
        table, bias = self.head
        flat = tf.nn.bias_add(tf.matmul(tf.reshape(hidden, [-1, self.s.width]), table, transpose_b=True), bias)
        return tf.reshape(flat, [*sizes(hidden)[:-1], table.shape[0]])

    def initial_carry(self, rows: Any) -> Carry:
        """Return the state at the start of a text: zeros."""
        zeros = tf.zeros((rows, self.s.width // self._model_shard.tensor))
        return [(zeros,) * self.s.carries for _ in self._model_shard.layers]

    def cache(self, rows: int) -> Carry:
        """Return the empty cache of decoding: the state at the start."""
        return self.initial_carry(rows)

    def check_length(self, cache: Carry, added: int) -> None:
        """Accept any number of tokens: a recurrent model has no longest context."""

    def extend(self, tokens: tf.Tensor, x: tf.Tensor | None, cache: Carry) -> tuple[tf.Tensor, Carry]:
        """Return this stage's activations of tokens that follow the state ``cache``; see ``hidden``."""
        return self.hidden(tokens, x, cache, False, False, tf.constant([0, 0]))

    def join(self, caches: Sequence[Carry], rows: tf.Tensor) -> Carry:
        """Return the cache whose row i is row ``rows[i]`` of ``caches``, whose rows are numbered in turn."""
        layers = zip(*caches, strict=True)
        return [tuple(tf.gather(tf.concat(states, 0), rows) for states in zip(*layer, strict=True)) for layer in layers]

    def carry_arrays(self, carry: Carry) -> dict[str, np.ndarray]:
        """Return {layer.index: float32 ``[rows, hidden / ranks]``} of a carried state."""
        return {
            f"{i}.{j}": t.numpy()
            for i, state in zip(self._model_shard.layers, carry, strict=True)
            for j, t in enumerate(state)
        }

    def carry_tensors(self, arrays: Mapping[str, np.ndarray], micro_rows: int | None) -> dict[int, Carry]:
        """Return the carried state of every micro-batch of ``micro_rows`` rows (None: all) from that of all rows."""
        if not arrays:
            return {}
        rows = len(next(iter(arrays.values())))
        step = micro_rows or rows
        return {
            number: self._carry_of_rows(arrays, slice(start, start + step))
            for number, start in enumerate(range(0, rows, step))
        }

    def _carry_of_rows(self, arrays: Mapping[str, np.ndarray], rows: slice) -> Carry:
        def tensor(i: int, j: int) -> tf.Tensor:
            return tf.constant(arrays[f"{i}.{j}"][rows])

        return [tuple(tensor(i, j) for j in range(self.s.carries)) for i in self._model_shard.layers]

    def _layer(self, number: int, x: tf.Tensor, w: Any, b_w: Any, r: Any, b_r: Any, *state: Any) -> Any:
        """Return ``[rows, time, hidden]`` of all ranks, and this rank's state after the last time step.

        ``w``, ``b_w``: weight and bias of the input, ``r``, ``b_r`` of the hidden units of the time step before.
        """
        width, gates = self.s.width, self.s.gates
        hidden = width // self._model_shard.tensor
        rows = sizes(x)[0]
        # Of all time steps at once: one large product instead of one per token.
        a = tf.nn.bias_add(tf.matmul(tf.reshape(x, [-1, width]), tf.reshape(w, [width, -1])), tf.reshape(b_w, [-1]))
        a = tf.unstack(tf.reshape(a, [rows, -1, gates, hidden]), axis=2)  # of every gate [rows, time, hidden / ranks]
        r, b_r = tf.reshape(r, [width, -1]), tf.reshape(b_r, [-1])
        state = tuple(tf.cast(t, self.dtype) for t in state)

        def join(h: tf.Tensor) -> tf.Tensor:
            return h if self._c.size == 1 else self._c.join(h, f"{number}.hidden")

        def step(before: tuple[Any, ...], a_t: Any) -> tuple[Any, ...]:
            """Return (h of all ranks, state of this one) of the next time step from those of the one before."""
            b = tf.nn.bias_add(tf.matmul(before[0], r), b_r)
            # By gate: of the product, its bias and a_t, TensorFlow's optimizer of graphs would make one operation, for
            # which it has no kernel beside Horovod's operations ("Fusion is not implemented: [BiasAdd,Add]").
            after = self._cell(a_t, tf.unstack(tf.reshape(b, [-1, gates, hidden]), axis=1), *before[1:])
            return (join(after[0]), *after)

        # No gradient flows into the batch before: cut here, so that none is summed over ranks for it.
        h_and_state = (state[0] if self._c.size == 1 else tf.stop_gradient(join(state[0])), *state)
        if x.shape[1] is None:  # a prompt's length is open in the graph
            states = tf.scan(step, [tf.transpose(gate, [1, 0, 2]) for gate in a], h_and_state)
            return (tf.transpose(states[0], [1, 0, 2]), *(s[-1] for s in states[1:]))
        outputs = []
        for a_t in zip(*(tf.unstack(gate, x.shape[1], 1) for gate in a), strict=True):
            h_and_state = step(h_and_state, a_t)
            outputs.append(h_and_state[0])
        return (tf.stack(outputs, 1), *h_and_state[1:])


def _tanh(a: Sequence[tf.Tensor], b: Sequence[tf.Tensor], h: tf.Tensor) -> tuple[tf.Tensor]:
    return (tf.tanh(a[0] + b[0]),)


def _gru(a: Sequence[tf.Tensor], b: Sequence[tf.Tensor], h: tf.Tensor) -> tuple[tf.Tensor]:
    r, z = tf.sigmoid(a[0] + b[0]), tf.sigmoid(a[1] + b[1])
    n = tf.tanh(a[2] + r * b[2])
    return ((1.0 - z) * n + z * h,)


def _lstm(a: Sequence[tf.Tensor], b: Sequence[tf.Tensor], h: tf.Tensor, c: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    i, f, g, o = (left + right for left, right in zip(a, b, strict=True))
    c = tf.sigmoid(f) * c + tf.sigmoid(i) * tf.tanh(g)
    return tf.sigmoid(o) * tf.tanh(c), c
