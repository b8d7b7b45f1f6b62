"""The order of TensorFlow's backward pass: a layer's gradients before those of the layer below."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def test_a_layer_s_parameters_come_before_the_layer_below() -> None:
    import tensorflow as tf

    from hvdlm_tensorflow.ordering import parameters_first

    def layer(x: tf.Tensor, weight: tf.Tensor, bias: tf.Tensor, unused: tf.Tensor) -> tf.Tensor:
        return tf.tanh(tf.matmul(x, weight) + bias)

    arrays = [np.random.default_rng(seed).normal(size=shape) for seed, shape in enumerate([(3, 4), (4, 5), (5,), (2,)])]
    values = [tf.constant(array, tf.float32) for array in arrays]
    graphs = []

    def gradients(called: Callable[..., tf.Tensor]) -> list[np.ndarray]:
        def graph() -> list[tf.Tensor]:
            with tf.GradientTape() as tape:
                tape.watch(values)
                loss = tf.reduce_sum(tf.square(called(*values)))
            zero = tf.UnconnectedGradients.ZERO
            graphs.append(tape.gradient(loss, values, unconnected_gradients=zero))
            return graphs[-1]

        return [array.numpy() for array in tf.function(graph, autograph=False)()]

    for expected, actual in zip(gradients(layer), gradients(parameters_first(layer)), strict=True):
        np.testing.assert_array_equal(actual, expected)
    of_x, *of_parameters = (tensor.op for tensor in graphs[1])
    assert set(of_parameters[:2]) <= set(of_x.control_inputs) and not graphs[0][0].op.control_inputs
