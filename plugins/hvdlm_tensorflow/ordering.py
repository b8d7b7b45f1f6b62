"""The order in which a backward pass computes a layer's gradients.

Without a twin: PyTorch's backward pass computes them before those of the layer below anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf


def parameters_first(layer: Callable[..., tf.Tensor]) -> Callable[..., tf.Tensor]:
    """Return ``layer(x, *parameters)`` whose backward pass ends before that of the layer below begins.

    TensorFlow's executor would follow the activations' gradients down to the first layer, since what became ready last
    comes first, and compute those of the parameters after that: their buckets would be sent when nothing is left that
    hides it.
    """

    @tf.custom_gradient
    def ordered(x: tf.Tensor, *parameters: tf.Tensor) -> tuple[tf.Tensor, Callable[..., Any]]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([x, *parameters])
            y = layer(x, *parameters)

        def gradient(of_y: tf.Tensor) -> list[tf.Tensor]:
            zero = tf.UnconnectedGradients.ZERO
            of_x, *of_parameters = tape.gradient(y, [x, *parameters], of_y, unconnected_gradients=zero)
            with tf.control_dependencies(of_parameters):
                return [tf.identity(of_x), *of_parameters]

        return y, gradient

    return ordered
