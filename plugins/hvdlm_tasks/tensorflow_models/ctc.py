"""What hears, in TensorFlow: the equations of ``hvdlm_tasks.models.ctc``, in the same order."""

from __future__ import annotations

from collections.abc import Mapping

import tensorflow as tf
from hvdlm_tasks.models.ctc import CONVOLUTIONS, scored
from hvdlm_tasks.tensorflow_models.encoder_decoder_layers import Reader, within


class CTC(Reader):
    """Scores of characters for every second frame."""

    def compute(self, tokens: tf.Tensor, x: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Return ``[rows, T / 2, width]`` of the frames in ``x``; ``tokens`` are not looked at."""
        h, lengths = tf.cast(x["frames"], self.dtype), self.lengths(x)
        for number in range(CONVOLUTIONS):
            weight, stride = self.p[f"conv.{number}.weight"], 1 if number else 2  # [kernel, inputs, width]
            made = tf.nn.conv1d(tf.pad(h, [[0, 0], [2, 2], [0, 0]]), weight, stride, "VALID")
            mask = within(lengths, tf.shape(made)[1])
            made = tf.nn.gelu(tf.nn.bias_add(made, self.p[f"conv.{number}.bias"]), approximate=True)
            made *= tf.cast(mask[:, 0, 0, :, None], h.dtype)
            h = h + made if number else made
        h = self.dropout(self.place(h))
        for i in range(self.s.layers):
            h = self.encoder_layer(h, mask, f"encoder.{i}")
        return self.norm(h, "final_norm")

    def lengths(self, x: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Return how many frames have scores, int32 ``[rows]``."""
        return scored(x["frame_count"])

    def scores(self, hidden: tf.Tensor) -> tf.Tensor:
        """Return logits ``[..., vocab]``."""
        return self.linear(hidden, "head")
