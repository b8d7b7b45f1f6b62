"""Encoder and decoder layers in TensorFlow: the equations of ``hvdlm_tasks.models.encoder_decoder_layers``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from hvdlm.errors import HvdlmError
from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm_tasks.models import encoder_decoder_layers as layers
from hvdlm_tensorflow.attention import attend
from hvdlm_tensorflow.collectives import Collectives
from hvdlm_tensorflow.models.base import ModelBase
from hvdlm_tensorflow.shapes import sizes

Parameters = Mapping[str, tf.Tensor]
KeysValues = tuple[tf.Tensor, tf.Tensor]  # each [rows, heads, keys, head]


class EncoderBase(ModelBase):
    """Base of models with an encoder: their layers. They carry no state from batch to batch."""

    def __init__(self, settings: Any, model_shard: ModelShard, collectives: Collectives) -> None:
        super().__init__(settings, model_shard, collectives)
        self._seed = tf.constant([0, 0])
        self._dropouts = 0  # applied in this pass so far: each draws from a seed of its own
        self._rate = 0.0

    def bind(self, parameters: Parameters) -> None:
        """Use these tensors as parameters, all but those of normalisation in the compute precision."""
        self.p = {n: t if "norm" in n else tf.cast(t, self.dtype) for n, t in parameters.items()}

    def start_pass(self, training: bool, seed: tf.Tensor) -> None:
        """Set the dropout of a forward pass; ``seed``: int32 ``[2]``."""
        self._seed = seed
        self._dropouts = 0
        self._rate = self.s.dropout if training else 0.0

    def hidden(
        self, tokens: tf.Tensor, x: Any, carry: Any, training: bool, checkpointing: bool, seed: tf.Tensor
    ) -> tuple[tf.Tensor, Any]:
        """Return ``compute`` of the batch's tokens and features ``x``, and ``carry`` unchanged."""
        self.start_pass(training, seed)
        return self.compute(tokens, x), carry

    def compute(self, tokens: tf.Tensor, x: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Return hidden states ``[rows, time, width]`` for ``tokens`` ``[rows, time]`` and the features ``x``."""
        raise NotImplementedError

    def linear(self, x: tf.Tensor, name: str) -> tf.Tensor:
        """Apply a linear layer to ``x`` ``[..., inputs]``; return ``[..., outputs]``."""
        weight = self.p[f"{name}.weight"]
        flat = tf.nn.bias_add(tf.matmul(tf.reshape(x, [-1, weight.shape[0]]), weight), self.p[f"{name}.bias"])
        return tf.reshape(flat, [*sizes(x)[:-1], weight.shape[1]])

    def norm(self, x: tf.Tensor, name: str) -> tf.Tensor:
        """Apply layer normalisation to ``x`` ``[..., width]``."""
        centred = tf.cast(x, tf.float32)
        centred -= tf.reduce_mean(centred, -1, keepdims=True)
        variance = tf.reduce_mean(tf.square(centred), -1, keepdims=True)
        scaled = centred * (tf.math.rsqrt(variance + layers.EPSILON) * self.p[f"{name}.scale"])
        return tf.cast(scaled + self.p[f"{name}.bias"], self.dtype)

    def dropout(self, x: tf.Tensor) -> tf.Tensor:
        """Apply dropout to ``x`` in training."""
        if not self._rate:
            return x
        self._dropouts += 1
        seed = self._seed + tf.constant([0, self._dropouts])
        return tf.nn.experimental.stateless_dropout(x, self._rate, seed=seed)

    def add_positions(self, x: tf.Tensor, start: Any = 0) -> tf.Tensor:
        """Add sinusoidal positions from ``start`` on to ``x`` ``[rows, time, width]``."""
        times = tf.cast(tf.range(tf.shape(x)[1]) + start, tf.float64)
        angle = times[:, None] * layers.frequencies(self.s.width)[None]
        table = tf.reshape(tf.stack([tf.sin(angle), tf.cos(angle)], -1), [-1, 2 * angle.shape[1]])
        return x + tf.cast(table[:, : self.s.width], x.dtype)

    def keys_values(self, y: tf.Tensor, name: str) -> KeysValues:
        """Return the keys and values of ``y`` ``[rows, keys, width]``."""
        return self._heads(self.linear(y, f"{name}.key")), self._heads(self.linear(y, f"{name}.value"))

    def attend(self, x: tf.Tensor, kv: KeysValues, mask: tf.Tensor | None, name: str) -> tf.Tensor:
        """Attend from ``x`` ``[rows, time, width]`` to keys where ``mask``, bool ``[rows, 1, time, keys]``, is true."""
        q = self._heads(self.linear(x, f"{name}.query"))
        attended = attend(q, *kv, None if mask is None else tf.where(mask, 0.0, -np.inf))
        return self.linear(attended, f"{name}.output")

    def mlp(self, x: tf.Tensor, name: str) -> tf.Tensor:
        """Apply a feed-forward layer to ``x`` ``[..., width]``."""
        return self.linear(tf.nn.relu(self.linear(x, f"{name}.up")), f"{name}.down")

    def encoder_layer(self, x: tf.Tensor, mask: tf.Tensor, name: str) -> tf.Tensor:
        """Apply an encoder layer to ``x`` ``[rows, time, width]``; ``mask``: the positions attended to."""
        h = self.norm(x, f"{name}.attention_norm")
        h = self.attend(h, self.keys_values(h, f"{name}.attention"), mask, f"{name}.attention")
        x += self.dropout(h)
        return x + self.dropout(self.mlp(self.norm(x, f"{name}.mlp_norm"), f"{name}.mlp"))

    def _heads(self, x: tf.Tensor) -> tf.Tensor:
        rows, time, width = sizes(x)
        return tf.transpose(tf.reshape(x, [rows, time, self.s.heads, width // self.s.heads]), [0, 2, 1, 3])

    def cache(self, rows: int) -> Any:
        """Raise an error: these models generate from features, not from a prompt."""
        raise HvdlmError("this model generates from its features, not from a text.")


def valid_positions(lengths: tf.Tensor, time: Any) -> tf.Tensor:
    """Return the padding mask: true for positions below a row's length, bool ``[rows, 1, 1, time]``."""
    return tf.sequence_mask(lengths, time)[:, None, None]
