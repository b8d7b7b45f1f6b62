"""CTC speech encoder in TensorFlow: the equations of ``hvdlm_tasks.models.ctc``, in the same order."""

from __future__ import annotations

from collections.abc import Mapping

import tensorflow as tf

from hvdlm_tasks.models.ctc import CONVOLUTIONS, output_frames
from hvdlm_tasks.tensorflow_models.encoder_decoder_layers import EncoderBase, valid_positions


class CTC(EncoderBase):
    """Logits of the characters for every second frame."""

    def compute(self, tokens: tf.Tensor, x: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Return ``[rows, T / 2, width]`` for the frames in ``x``; ``tokens`` are not used."""
        h, lengths = tf.cast(x["frames"], self.dtype), self.lengths(x)
        for number in range(CONVOLUTIONS):
            weight, stride = self.p[f"conv.{number}.weight"], 1 if number else 2  # [kernel, inputs, width]
            convolved = tf.nn.conv1d(tf.pad(h, [[0, 0], [2, 2], [0, 0]]), weight, stride, "VALID")
            mask = valid_positions(lengths, tf.shape(convolved)[1])
            convolved = tf.nn.gelu(tf.nn.bias_add(convolved, self.p[f"conv.{number}.bias"]), approximate=True)
            convolved *= tf.cast(mask[:, 0, 0, :, None], h.dtype)
            h = h + convolved if number else convolved
        h = self.dropout(self.add_positions(h))
        for i in range(self.s.layers):
            h = self.encoder_layer(h, mask, f"encoder.{i}")
        return self.norm(h, "final_norm")

    def lengths(self, x: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Return the number of output frames, int32 ``[rows]``."""
        return output_frames(x["frame_count"])

    def scores(self, hidden: tf.Tensor) -> tf.Tensor:
        """Return logits ``[..., vocab]``."""
        return self.linear(hidden, "head")
