"""The exponential moving average of a flat vector: see ``hvdlm.parallel.moving_average``."""

from __future__ import annotations

import tensorflow as tf

from hvdlm_tensorflow.optimizers import interpolated


class MovingAverage:
    """The average of the flat float32 ``parameter`` ``[size]``, which begins as a copy of it.

    Attributes:
        vector: the average, float32 ``[size]``.
    """

    def __init__(self, decay: float, parameter: tf.Variable) -> None:
        self._decay = decay
        self._parameter = parameter
        self.vector = tf.Variable(parameter.read_value(), trainable=False)

    def update(self, step: tf.Tensor) -> None:
        """Include the parameters after update number ``step`` (from 0; float64), in a graph."""
        decay = tf.minimum(tf.constant(self._decay, tf.float64), (1.0 + step) / (10.0 + step))
        weight = tf.cast(1.0 - decay, tf.float32)
        self.vector.assign(interpolated(self.vector.read_value(), self._parameter.read_value(), weight))
