"""Writes into a part of a Variable without a copy of the whole.

Without a twin: in PyTorch, a part of a tensor is a tensor, which is written into.
"""

from __future__ import annotations

import tensorflow as tf


@tf.function(
    autograph=False,
    input_signature=[
        tf.TensorSpec([], tf.resource),
        tf.TensorSpec([], tf.int32),
        tf.TensorSpec([None], tf.float32),
    ],
)
def _replace(handle: tf.Tensor, start: tf.Tensor, values: tf.Tensor) -> None:
    whole = tf.raw_ops.ReadVariableOp(resource=handle, dtype=tf.float32)
    with tf.control_dependencies([whole]):
        # The variable lets go of its memory, so that the next operation, its only owner, writes into it.
        emptied = tf.raw_ops.AssignVariableOp(resource=handle, value=tf.zeros([0]), validate_shape=False)
    with tf.control_dependencies([emptied]):
        written = tf.raw_ops.TensorStridedSliceUpdate(
            input=whole, begin=[start], end=[start + tf.shape(values)[0]], strides=[1], value=values
        )
    tf.raw_ops.AssignVariableOp(resource=handle, value=written)


def replace_elements(variable: tf.Variable, start: int, values: tf.Tensor) -> None:
    """Replace the elements of a float32 Variable ``[n]`` from ``start`` on by ``values`` ``[m]``. Outside of graphs.

    Not by TensorFlow's assignment to a slice (``ResourceStridedSliceAssign``), after which every read of the Variable,
    in every graph, copies all of it; nor by an assignment of the whole, which is a copy, too.
    """
    _replace(variable.handle, tf.constant(start), values)
