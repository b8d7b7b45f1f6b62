"""Collectives through host memory, for transports that know arrays only (backend mpi4py).

Outside of graphs a tensor shares its memory with the array. Inside a graph, one operation starts a collective and
another waits for it. A graph runs independent operations in any order, and the transport needs the same order on all
ranks: each start depends on the start that was traced before it. A wait depends on all starts that were traced before
it, because it blocks a thread, and TensorFlow may have one thread only for operations. Tensors on a GPU are copied by
TensorFlow itself, through pinned memory, because these operations are placed on the CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import tensorflow as tf

from hvdlm.protocols.framework import HostCollective
from hvdlm.protocols.group import Handle

Shape = tuple[int | None, ...]
_LAST_START = "hvdlm_last_start"  # the attribute of a graph that holds the operation of its newest start
_ALIGNMENT = 64  # bytes: TensorFlow's kernels take no memory that begins elsewhere


class HostTensors:
    """Implements ``HostTensors``."""

    def __init__(self) -> None:
        self._in_flight: dict[int, Handle] = {}  # what graphs have started and not waited for
        self._numbers = itertools.count()

    def through(self, tensor: tf.Tensor, collective: HostCollective, shape: Shape) -> Handle:
        """Start ``collective`` on the values of ``tensor``."""
        if tf.executing_eagerly():
            with tf.device("CPU:0"):
                values = tf.identity(tensor) if "GPU" in tensor.device else tensor
            return _Eager(collective(_array(_bits(values), tensor.dtype), None), tensor.dtype)
        graph = tf.compat.v1.get_default_graph()
        before = getattr(graph, _LAST_START, None)

        def start(values: tf.Tensor) -> np.int64:
            number = next(self._numbers)
            self._in_flight[number] = collective(_array(values, tensor.dtype), None)
            return np.int64(number)

        with tf.control_dependencies([] if before is None else [before]), tf.device("CPU:0"):
            number = tf.py_function(start, [_bits(tensor)], tf.int64)
        setattr(graph, _LAST_START, number)
        return _Traced(self._wait_for, graph, number, tensor.dtype, shape)

    def together(self, tensors: Sequence[tf.Tensor], collective: HostCollective) -> Handle:
        """Start ``collective`` once, on the values of all ``tensors`` in one flat array."""
        if not tf.executing_eagerly():
            flat = tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], 0)
            return _TracedTogether(self.through(flat, collective, tuple(flat.shape)), tensors)
        # By numpy in a tenth of the time that operations on many small tensors take.
        arrays = [_array(_bits(tensor), tensor.dtype) for tensor in tensors]
        step = _ALIGNMENT // arrays[0].itemsize
        starts = np.cumsum([0, *(-(-array.size // step) * step for array in arrays)]).tolist()
        flat = np.zeros(starts[-1], arrays[0].dtype)
        for start, array in zip(starts, arrays, strict=False):
            flat[start : start + array.size] = array.reshape(-1)
        return _EagerTogether(collective(flat, None), arrays, starts, tensors[0].dtype)

    def _wait_for(self, number: tf.Tensor) -> tf.Tensor:
        """Return the result of the collective of this number, while a graph runs."""
        return _tensor(self._in_flight.pop(int(number)).wait())


class _Eager:
    """A collective that was started outside of graphs."""

    def __init__(self, handle: Handle, dtype: tf.DType) -> None:
        self._handle = handle
        self._dtype = dtype

    def wait(self) -> tf.Tensor:
        """Return the result."""
        return _from_bits(_tensor(self._handle.wait()), self._dtype)


class _EagerTogether:
    """A collective on several tensors as one, outside of graphs."""

    def __init__(self, handle: Handle, arrays: Sequence[np.ndarray], starts: Sequence[int], dtype: tf.DType) -> None:
        self._handle = handle
        self._arrays = arrays
        self._starts = starts
        self._dtype = dtype

    def wait(self) -> list[tf.Tensor]:
        """Return the results."""
        flat = self._handle.wait()
        results = [flat[a : a + b.size].reshape(b.shape) for a, b in zip(self._starts, self._arrays, strict=False)]
        return [_from_bits(_tensor(result), self._dtype) for result in results]


class _Traced:
    """A collective that a graph starts when it runs."""

    def __init__(
        self, wait_for: Callable[[tf.Tensor], tf.Tensor], graph: Any, number: tf.Tensor, dtype: tf.DType, shape: Shape
    ) -> None:
        self._wait_for = wait_for
        self._graph = graph
        self._number = number
        self._dtype = dtype
        self._shape = shape

    def wait(self) -> tf.Tensor:
        """Return the result."""
        sent_as = tf.int16 if self._dtype == tf.bfloat16 else self._dtype
        with tf.control_dependencies([getattr(self._graph, _LAST_START)]), tf.device("CPU:0"):
            result = tf.py_function(self._wait_for, [self._number], sent_as)
        result.set_shape(self._shape)
        return _from_bits(result, self._dtype)


class _TracedTogether:
    """A collective on several tensors as one, inside a graph."""

    def __init__(self, handle: Handle, tensors: Sequence[tf.Tensor]) -> None:
        self._handle = handle
        self._tensors = tensors

    def wait(self) -> list[tf.Tensor]:
        """Return the results."""
        results = tf.split(self._handle.wait(), [tensor.shape.num_elements() for tensor in self._tensors])
        return [tf.reshape(result, tensor.shape) for result, tensor in zip(results, self._tensors, strict=True)]


def _bits(tensor: tf.Tensor) -> tf.Tensor:
    """Return ``tensor``; of bfloat16, whose memory TensorFlow doesn't expose, the integers of its bits."""
    return tf.bitcast(tensor, tf.int16) if tensor.dtype == tf.bfloat16 else tensor


def _from_bits(tensor: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Return the tensor of ``dtype`` that ``_bits`` has made ``tensor`` of."""
    return tensor if tensor.dtype == dtype else tf.bitcast(tensor, dtype)


def _array(tensor: tf.Tensor, dtype: tf.DType) -> np.ndarray:
    """Return the array of ``dtype`` that shares a tensor's memory (``numpy()`` copies it)."""
    array = np.asarray(memoryview(tensor))
    return array.view(ml_dtypes.bfloat16) if dtype == tf.bfloat16 else array


def _tensor(array: np.ndarray) -> tf.Tensor:
    """Return the tensor that takes over an array's memory; of bfloat16, the integers of its bits.

    A backend may return any array; kernels abort the process on memory that isn't aligned, so that it is copied.
    """
    if array.dtype == ml_dtypes.bfloat16:
        array = array.view(np.int16)
    flags = array.flags
    if array.__array_interface__["data"][0] % _ALIGNMENT or not (flags.c_contiguous and flags.writeable):
        return tf.constant(array)
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
