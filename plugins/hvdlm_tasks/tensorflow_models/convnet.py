"""Convolutional image classifier in TensorFlow: the equations of ``hvdlm_tasks.models.convnet``, in the same order."""

from __future__ import annotations

from collections.abc import Mapping

import tensorflow as tf

from hvdlm_tasks.tensorflow_models.encoder_decoder_layers import EncoderBase


class Convnet(EncoderBase):
    """Logits of every class for an image."""

    def compute(self, tokens: tf.Tensor, x: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Return the hidden layer ``[rows, 1, 50]`` for the images in ``x``; ``tokens`` are not used."""
        h = tf.cast(x["images"], self.dtype)[..., None]  # [rows, 28, 28, 1]
        for name in ("conv.0", "conv.1"):
            h = tf.nn.bias_add(tf.nn.conv2d(h, self.p[f"{name}.weight"], 1, "VALID"), self.p[f"{name}.bias"])
            h = tf.nn.relu(tf.nn.max_pool2d(h, 2, 2, "VALID"))
        h = tf.reshape(h, [tf.shape(h)[0], 4 * 4 * 20])
        return self.dropout(tf.nn.relu(self.linear(h, "dense")))[:, None]

    def scores(self, hidden: tf.Tensor) -> tf.Tensor:
        """Return logits ``[..., vocab]``."""
        return self.linear(hidden, "head")
