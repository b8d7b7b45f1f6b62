"""Tensors through host memory, for transports that know arrays alone (backend mpi4py).

Outside of graphs a tensor shares its memory with the array. Inside a graph, one operation starts a collective and
another waits for it. A graph runs operations that don't depend on each other in any order, and the transport needs the
same order on all ranks: each start follows the start that was traced before it. A wait follows all starts that were
traced before it, because TensorFlow may have one thread for operations, which a wait takes. TensorFlow itself copies
what lies on a GPU, through pinned memory, because these operations are placed on the CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import tensorflow as tf

from hvdlm.protocols.framework import HostCollective
from hvdlm.protocols.group import Handle

Shape = tuple[int | None, ...]
_LAST = "hvdlm_last_start"  # where a graph keeps the operation that starts its newest collective


class TensorFlowHostTensors:
    """Takes TensorFlow's tensors through host memory."""

    def __init__(self) -> None:
        self._flying: dict[int, Handle] = {}  # what graphs have started and not waited for
        self._numbers = itertools.count()

    def through(self, tensor: tf.Tensor, collective: HostCollective, shape: Shape) -> Handle:
        """Start ``collective`` on the values of ``tensor``; see ``interfaces.HostTensors``."""
        if tf.executing_eagerly():
            with tf.device("CPU:0"):
                values = tf.identity(tensor) if "GPU" in tensor.device else tensor
            return _Eager(collective(_array(_bits(values), tensor.dtype), None), tensor.dtype)
        graph = tf.compat.v1.get_default_graph()
        before = getattr(graph, _LAST, None)

        def start(values: tf.Tensor) -> np.int64:
            number = next(self._numbers)
            self._flying[number] = collective(_array(values, tensor.dtype), None)
            return np.int64(number)

        with tf.control_dependencies([] if before is None else [before]), tf.device("CPU:0"):
            number = tf.py_function(start, [_bits(tensor)], tf.int64)
        setattr(graph, _LAST, number)
        return _Traced(self, graph, number, tensor.dtype, shape)

    def finish(self, number: tf.Tensor) -> tf.Tensor:
        """Return the result of the collective of this number, inside a graph's run."""
        return _tensor(self._flying.pop(int(number)).wait())

    def together(self, tensors: Sequence[tf.Tensor], collective: HostCollective) -> Handle:
        """Start ``collective`` on the values of all ``tensors``; see ``interfaces.HostTensors``."""
        if not tf.executing_eagerly():
            flat = tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], 0)
            return _TracedTogether(self.through(flat, collective, tuple(flat.shape)), tensors)
        # By numpy in a tenth of the time that operations on many small tensors take.
        arrays = [_array(_bits(tensor), tensor.dtype) for tensor in tensors]
        step = 64 // arrays[0].itemsize  # elements between the addresses at which TensorFlow's memory may begin
        starts = np.cumsum([0, *(-(-array.size // step) * step for array in arrays)]).tolist()
        flat = np.zeros(starts[-1], arrays[0].dtype)
        for start, array in zip(starts, arrays, strict=False):
            flat[start : start + array.size] = array.reshape(-1)
        return _EagerTogether(collective(flat, None), arrays, starts, tensors[0].dtype)


class _Eager:
    """A collective that was started outside of graphs."""

    def __init__(self, handle: Handle, dtype: tf.DType) -> None:
        self._handle, self._dtype = handle, dtype

    def wait(self) -> tf.Tensor:
        """Return the result."""
        return _meant(_tensor(self._handle.wait()), self._dtype)


class _EagerTogether:
    """A collective on several tensors as one, outside of graphs."""

    def __init__(self, handle: Handle, arrays: Sequence[np.ndarray], starts: Sequence[int], dtype: tf.DType) -> None:
        self._handle, self._arrays, self._starts, self._dtype = handle, arrays, starts, dtype

    def wait(self) -> list[tf.Tensor]:
        """Return the results."""
        flat = self._handle.wait()
        parts = [flat[a : a + b.size].reshape(b.shape) for a, b in zip(self._starts, self._arrays, strict=False)]
        return [_meant(_tensor(part), self._dtype) for part in parts]


class _TracedTogether:
    """A collective on several tensors as one, inside a graph."""

    def __init__(self, handle: Handle, tensors: Sequence[tf.Tensor]) -> None:
        self._handle, self._tensors = handle, tensors

    def wait(self) -> list[tf.Tensor]:
        """Return the results."""
        parts = tf.split(self._handle.wait(), [tensor.shape.num_elements() for tensor in self._tensors])
        return [tf.reshape(part, tensor.shape) for part, tensor in zip(parts, self._tensors, strict=True)]


class _Traced:
    """A collective that a graph starts when it runs."""

    def __init__(
        self, tensors: TensorFlowHostTensors, graph: Any, number: tf.Tensor, dtype: tf.DType, shape: Shape
    ) -> None:
        self._tensors, self._graph, self._number, self._dtype, self._shape = tensors, graph, number, dtype, shape

    def wait(self) -> tf.Tensor:
        """Return the result."""
        travels = tf.int16 if self._dtype == tf.bfloat16 else self._dtype
        with tf.control_dependencies([getattr(self._graph, _LAST)]), tf.device("CPU:0"):
            result = tf.py_function(self._tensors.finish, [self._number], travels)
        result.set_shape(self._shape)
        return _meant(result, self._dtype)


def _bits(tensor: tf.Tensor) -> tf.Tensor:
    """Return ``tensor``; of bfloat16, of which TensorFlow shows no memory, the integers of its bits."""
    return tf.bitcast(tensor, tf.int16) if tensor.dtype == tf.bfloat16 else tensor


def _meant(tensor: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Return what has travelled as what it means."""
    return tensor if tensor.dtype == dtype else tf.bitcast(tensor, dtype)


def _array(tensor: tf.Tensor, dtype: tf.DType) -> np.ndarray:
    """Return the array that shares a tensor's memory (``numpy()`` copies it), as of the dtype that it means."""
    array = np.asarray(memoryview(tensor))
    return array.view(ml_dtypes.bfloat16) if dtype == tf.bfloat16 else array


def _tensor(array: np.ndarray) -> tf.Tensor:
    """Return the tensor that takes an array's memory over; of bfloat16, the integers of its bits."""
    if array.dtype == ml_dtypes.bfloat16:
        array = array.view(np.int16)
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
