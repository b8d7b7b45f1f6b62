"""Elements of a Variable of TensorFlow are replaced in its own memory, and later reads don't copy it."""

from __future__ import annotations

from typing import Any

import numpy as np


def address(variable: Any) -> int:
    """Return where the values lie that a graph reads."""
    import tensorflow as tf

    read = tf.function(variable.read_value, autograph=False)()
    return np.from_dlpack(read).ctypes.data


def test_elements_are_replaced_without_a_copy_of_the_variable() -> None:
    import tensorflow as tf

    from hvdlm_tensorflow.slices import replace_elements

    variable = tf.Variable(tf.range(1000, dtype=tf.float32))
    before = address(variable)
    replace_elements(variable, 10, tf.constant([-1.0, -2.0]))
    replace_elements(variable, 999, tf.constant([-3.0]))
    expected = np.arange(1000, dtype=np.float32)
    expected[[10, 11, 999]] = [-1.0, -2.0, -3.0]
    np.testing.assert_array_equal(variable.numpy(), expected)
    assert variable.shape == (1000,)
    assert address(variable) == address(variable) == before
    variable.assign_add(tf.ones(1000))
    np.testing.assert_array_equal(variable.numpy(), expected + 1)


def test_a_value_that_was_read_before_stays_as_it_was() -> None:
    import tensorflow as tf

    from hvdlm_tensorflow.slices import replace_elements

    variable = tf.Variable(tf.zeros(8))
    read = variable.read_value()
    replace_elements(variable, 2, tf.ones(3))
    np.testing.assert_array_equal(read.numpy(), np.zeros(8))
    np.testing.assert_array_equal(variable.numpy(), [0, 0, 1, 1, 1, 0, 0, 0])
