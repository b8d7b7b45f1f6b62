"""Transformers that read beside writing, in TensorFlow: the equations of ``hvdlm_tasks.models.encoder_decoder_layers``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from hvdlm_tasks.models import encoder_decoder_layers

from hvdlm.errors import HvdlmError
from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm_tensorflow.collectives import Collectives
from hvdlm_tensorflow.models.base import ModelBase

Parameters = Mapping[str, tf.Tensor]
KeysValues = tuple[tf.Tensor, tf.Tensor]  # each [rows, heads, keys, head]


class Reader(ModelBase):
    """A model that reads features and carries nothing from batch to batch: its layers, and what none of them needs."""

    def __init__(self, settings: Any, model_shard: ModelShard, collectives: Collectives) -> None:
        super().__init__(settings, model_shard, collectives)
        self._seed, self._drawn, self._rate = tf.constant([0, 0]), 0, 0.0

    def bind(self, parameters: Parameters) -> None:
        """Take these tensors as parameters."""
        self.p = {n: t if "norm" in n else tf.cast(t, self.dtype) for n, t in parameters.items()}

    def begin(self, training: bool, seed: tf.Tensor) -> None:
        """Have dropout draw from ``seed`` int32 ``[2]`` in this pass, where it is one of training."""
        self._seed, self._drawn, self._rate = seed, 0, self.s.dropout if training else 0.0

    def hidden(
        self, tokens: tf.Tensor, x: Any, carry: Any, training: bool, checkpointing: bool, seed: tf.Tensor
    ) -> tuple[tf.Tensor, Any]:
        """Return what ``compute`` makes of the batch's features ``x``, and ``carry`` as it is."""
        self.begin(training, seed)
        return self.compute(tokens, x), carry

    def compute(self, tokens: tf.Tensor, x: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Return ``[rows, time, width]`` of ``tokens`` ``[rows, time]`` and the features ``x``."""
        raise NotImplementedError

    def linear(self, x: tf.Tensor, name: str) -> tf.Tensor:
        """Return ``x`` ``[..., inputs]`` through a linear layer: ``[..., outputs]``."""
        weight = self.p[f"{name}.weight"]
        flat = tf.nn.bias_add(tf.matmul(tf.reshape(x, [-1, weight.shape[0]]), weight), self.p[f"{name}.bias"])
        return tf.reshape(flat, tf.concat([tf.shape(x)[:-1], [weight.shape[1]]], 0))

    def norm(self, x: tf.Tensor, name: str) -> tf.Tensor:
        """Return ``x`` ``[..., width]`` normalised."""
        wide = tf.cast(x, tf.float32)
        wide -= tf.reduce_mean(wide, -1, keepdims=True)
        variance = tf.reduce_mean(tf.square(wide), -1, keepdims=True)
        wide *= tf.math.rsqrt(variance + encoder_decoder_layers.EPSILON) * self.p[f"{name}.scale"]
        return tf.cast(wide + self.p[f"{name}.bias"], self.dtype)

    def dropout(self, x: tf.Tensor) -> tf.Tensor:
        """Return ``x``, parts of it dropped while training."""
        if not self._rate:
            return x
        self._drawn += 1
        seed = self._seed + tf.constant([0, self._drawn])
        return tf.nn.experimental.stateless_dropout(x, self._rate, seed=seed)

    def place(self, x: tf.Tensor, start: Any = 0) -> tf.Tensor:
        """Return ``x`` ``[rows, time, width]`` with the sinusoids of positions from ``start`` added."""
        times = tf.cast(tf.range(tf.shape(x)[1]) + start, tf.float64)
        angle = times[:, None] * encoder_decoder_layers.rates(self.s.width)[None]
        table = tf.reshape(tf.stack([tf.sin(angle), tf.cos(angle)], -1), [-1, 2 * angle.shape[1]])
        return x + tf.cast(table[:, : self.s.width], x.dtype)

    def keys_values(self, y: tf.Tensor, name: str) -> KeysValues:
        """Return the keys and values of ``y`` ``[rows, keys, width]``."""
        return self._heads(self.linear(y, f"{name}.key")), self._heads(self.linear(y, f"{name}.value"))

    def attend(self, x: tf.Tensor, kv: KeysValues, mask: tf.Tensor | None, name: str) -> tf.Tensor:
        """Return what ``x`` ``[rows, time, width]`` finds where ``mask`` is true, bool ``[rows, 1, time, keys]``."""
        q = self._heads(self.linear(x, f"{name}.query"))
        scores = tf.cast(tf.matmul(q * (self.s.width // self.s.heads) ** -0.5, kv[0], transpose_b=True), tf.float32)
        if mask is not None:
            scores += tf.where(mask, 0.0, -np.inf)
        found = tf.matmul(tf.cast(tf.nn.softmax(scores), self.dtype), kv[1])
        return self.linear(tf.reshape(tf.transpose(found, [0, 2, 1, 3]), tf.shape(x)), f"{name}.output")

    def mlp(self, x: tf.Tensor, name: str) -> tf.Tensor:
        """Return ``x`` ``[..., width]`` through a feed-forward layer."""
        return self.linear(tf.nn.relu(self.linear(x, f"{name}.up")), f"{name}.down")

    def encoder_layer(self, x: tf.Tensor, mask: tf.Tensor, name: str) -> tf.Tensor:
        """Return ``x`` ``[rows, time, width]`` through a layer whose positions see those of ``mask``."""
        h = self.norm(x, f"{name}.attention_norm")
        h = self.attend(h, self.keys_values(h, f"{name}.attention"), mask, f"{name}.attention")
        x += self.dropout(h)
        return x + self.dropout(self.mlp(self.norm(x, f"{name}.mlp_norm"), f"{name}.mlp"))

    def _heads(self, x: tf.Tensor) -> tf.Tensor:
        shape = tf.shape(x)
        heads = self.s.heads
        return tf.transpose(tf.reshape(x, [shape[0], shape[1], heads, self.s.width // heads]), [0, 2, 1, 3])

    def decoding_cache(self, rows: int) -> Any:
        """Refuse to write where nothing has been read."""
        raise HvdlmError("this model goes on from what it has read, not from a text.")


def within(lengths: tf.Tensor, time: Any) -> tf.Tensor:
    """Return which of ``time`` positions are below a row's length, bool ``[rows, 1, 1, time]``."""
    return tf.sequence_mask(lengths, time)[:, None, None]
