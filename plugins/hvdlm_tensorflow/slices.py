"""Writes into a part of a Variable without a copy of the whole.

Without a twin: in PyTorch, a part of a tensor is a tensor, which is written into.
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

_HANDLE = tf.TensorSpec([], tf.resource)  # of a Variable whose length a graph doesn't know, and which may be emptied


def replace_elements(variable: tf.Variable, start: int, values: tf.Tensor) -> None:
    """Replace the elements of a float32 Variable ``[n]`` from ``start`` on by ``values`` ``[m]``. Outside of graphs.

    Not by TensorFlow's assignment to a slice (``ResourceStridedSliceAssign``), after which every read of the Variable,
    in every graph, copies all of it; nor by an assignment of the whole, which is a copy, too.
    """
    _replace(variable.handle, tf.constant(start), values)


class Shrinking:
    """Multiplies elements of a float32 Variable ``[n]`` by 1 - rate x factor, in graphs; made outside of them.

    ``runs``: (start, stop, factor) of elements. No more than the longest of them is copied.
    """

    def __init__(self, variable: tf.Variable, runs: Sequence[tuple[int, int, float]]) -> None:
        self._variable = variable
        # Graphs don't know the shape of this handle, so that they may empty the Variable. Nor do they know whose it is:
        # what they do with the Variable before and after is ordered by hand.
        self._handle = tf.raw_ops.Identity(input=variable.handle)
        self._runs = runs

    def apply(self, rate: tf.Tensor, after: tf.Tensor) -> tf.Operation:
        """Multiply, when ``after`` is there; return the operation that later uses of the Variable have to wait for."""
        # An assignment, though of the same memory, waits for everything that has used the Variable before.
        before = tf.raw_ops.AssignVariableOp(resource=self._variable.handle, value=self._variable.read_value())
        with tf.control_dependencies([after] if before is None else [after, before]):  # None: not in a graph
            whole = take(self._handle)
        for start, stop, factor in self._runs:
            values = whole[start:stop]
            whole = with_elements(whole, start, values - values * (rate * factor))
        return tf.raw_ops.AssignVariableOp(resource=self._handle, value=whole)


def take(handle: tf.Tensor) -> tf.Tensor:
    """Return the values of a float32 Variable, in a graph, which alone has their memory: the Variable is emptied.

    Args:
        handle: of a Variable whose shape a graph doesn't know.
    """
    whole = tf.raw_ops.ReadVariableOp(resource=handle, dtype=tf.float32)
    with tf.control_dependencies([whole]):
        # The Variable lets go of its memory, so that the next operation, its only owner, writes into it.
        emptied = tf.raw_ops.AssignVariableOp(resource=handle, value=tf.zeros([0]), validate_shape=False)
    with tf.control_dependencies([emptied]):
        return tf.identity(whole)


def with_elements(whole: tf.Tensor, start: int | tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    """Return ``whole`` ``[n]`` with ``values`` ``[m]`` from ``start`` on: ``whole`` itself if nothing else reads it."""
    return tf.raw_ops.TensorStridedSliceUpdate(
        input=whole, begin=[start], end=[start + tf.shape(values)[0]], strides=[1], value=values
    )


@tf.function(autograph=False, input_signature=[_HANDLE, tf.TensorSpec([], tf.int32), tf.TensorSpec([None], tf.float32)])
def _replace(handle: tf.Tensor, start: tf.Tensor, values: tf.Tensor) -> None:
    tf.raw_ops.AssignVariableOp(resource=handle, value=with_elements(take(handle), start, values))
