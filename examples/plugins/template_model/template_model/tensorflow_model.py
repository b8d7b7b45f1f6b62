"""The n-gram model in TensorFlow; ``self.p`` holds the parameters by name."""

import tensorflow as tf

from hvdlm_tensorflow.models.base import ModelBase
from template_model import ORDER


class NGram(ModelBase):
    """The equations in ``template_model``."""

    def hidden(self, tokens, x, carry, training, checkpointing, seed):
        """[rows, time] -> [rows, time, vocab]."""
        p, time = self.p, tf.shape(tokens)[1]
        e = tf.pad(tf.gather(p["embed.tokens"], tokens), [[0, 0], [ORDER - 1, 0], [0, 0]])  # [rows, 3 + time, width]
        window = tf.concat([e[:, i : i + time] for i in range(ORDER)], -1)  # [rows, time, 4 * width]
        h = tf.tanh(window @ p["hidden.weight"] + p["hidden.bias"])
        return h @ p["head.weight"] + p["head.bias"], carry
