"""Horovod on TensorFlow's tensors (``horovod.tensorflow``): collectives, messages of a launch without MPI, and GPUs.

Its operations run asynchronously in graphs, and block outside of them: there, each is started in a thread. Outside of
graphs, TensorFlow reuses an operation that it has made before even if that had another name: what needs its name is a
graph of its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import ModuleType
from typing import Any

import numpy as np
import tensorflow as tf

from hvdlm.protocols.group import Done, Handle

_THREADS = "hvdlm-horovod"  # the names of threads of collectives begin with this
_PATIENCE = 1.0  # seconds in which idle threads end


class _Handle:
    """A collective that blocks a thread of its own."""

    def __init__(self, future: Future[tf.Tensor]) -> None:
        self._future = future

    def wait(self) -> tf.Tensor:
        """Return the result."""
        return self._future.result()


class Operations:
    """Implements ``HorovodOperations``; ``on_host``: tensors on GPUs are copied to host memory and back."""

    def __init__(self, hvd: ModuleType, on_host: bool) -> None:
        self._hvd = hvd
        self._threads = ThreadPoolExecutor(16, _THREADS)
        # TensorFlow copies the inputs of an operation to its device. None: where there is a kernel, the GPU first.
        self._device = "CPU:0" if on_host else None
        self._reductions = {"sum": hvd.Sum, "adasum": hvd.Adasum}
        self._broadcasts: dict[tuple[str, int, int], Callable[[Any], Any]] = {}
        self._collectives: dict[tuple[str, str, str, int], Callable[[Any], Any]] = {}

    def start(self, operation: str, tensor: tf.Tensor, name: str, members: Any, op: str = "sum") -> Handle:
        """Start a collective: in a graph, or outside of graphs in a thread."""

        def call(tensor: tf.Tensor) -> tf.Tensor:
            return self._call(operation, tensor, name, members, op)

        if not tf.executing_eagerly():
            return Done(call(tensor))
        key = operation, name, op, id(members)
        if key not in self._collectives:
            self._collectives[key] = tf.function(call, autograph=False)
        return _Handle(self._threads.submit(self._collectives[key], tensor))

    def _call(self, operation: str, tensor: tf.Tensor, name: str, members: Any, op: str) -> tf.Tensor:
        """Return the result of a collective, in a graph."""
        options = {"op": self._reductions[op]} if operation in ("all_reduce", "reduce_scatter") else {}
        call = getattr(self._hvd, operation.replace("_", ""))
        with tf.device(self._device):
            result = call(tensor, **_options(operation, name, members), **options)
        result = result[0] if isinstance(result, tuple) else result  # an all-to-all returns (tensor, splits)
        if operation == "reduce_scatter" and tensor.shape[0] and tensor.shape[0] % members.size() == 0:
            # Horovod leaves the length open in a graph, and later collectives on the shard are counted by its shape.
            result.set_shape([tensor.shape[0] // members.size(), *tensor.shape[1:]])
        if operation == "all_to_all":
            result.set_shape(tensor.shape)
        return result

    def start_broadcast(self, tensor: tf.Tensor, root: int, name: str, members: Any) -> _Handle:
        """Start a broadcast in a thread."""
        return _Handle(self._threads.submit(self._broadcast(root, name, members), tensor))

    def broadcast(self, tensor: tf.Tensor, root: int, name: str, members: Any) -> tf.Tensor:
        """Return the root's tensor."""
        return self._broadcast(root, name, members)(tensor)

    def _broadcast(self, root: int, name: str, members: Any) -> Callable[[tf.Tensor], tf.Tensor]:
        """Return the broadcast of this name as a graph of its own."""
        key = name, root, id(members)
        if key not in self._broadcasts:
            options = {"root_rank": root, **_options("broadcast", name, members)}

            def call(tensor: tf.Tensor) -> tf.Tensor:
                with tf.device(self._device):
                    return self._hvd.broadcast(tensor, **options)

            self._broadcasts[key] = tf.function(call, autograph=False)
        return self._broadcasts[key]

    def sum_together(self, tensors: Sequence[tf.Tensor], name: str, members: Any) -> list[tf.Tensor]:
        """Return the sums, fused by Horovod."""
        options = {"op": self._hvd.Sum, **_options("all_reduce", name, members)}
        with tf.device(self._device):
            return list(self._hvd.grouped_allreduce(list(tensors), **options))

    def barrier(self, members: Any) -> None:
        """Wait for all members, by a sum: ``horovod.tensorflow`` has no barrier."""
        options = {**_options("all_reduce", "barrier", members), "op": self._hvd.Sum, "name": "barrier"}
        with tf.device("CPU:0"):
            self._hvd.allreduce(tf.zeros(1), **options).numpy()

    def close(self) -> None:
        """End the threads; one in a collective that never ends, after a failure, is not waited for longer."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        end = time.monotonic() + _PATIENCE
        for thread in threading.enumerate():
            if thread.name.startswith(_THREADS):
                thread.join(max(0.0, end - time.monotonic()))


class Messages:
    """Implements ``HorovodMessages``."""

    def __init__(self, hvd: ModuleType) -> None:
        self._hvd = hvd
        self._sums: dict[str, Callable[[tf.Tensor], tf.Tensor]] = {}
        self._thread = ThreadPoolExecutor(1, "hvdlm-agree")

    def all_gather(self, array: np.ndarray, name: str) -> np.ndarray:
        """Return the concatenation of the ranks' arrays."""
        with tf.device("CPU:0"):
            return self._hvd.allgather(tf.constant(array), name=name).numpy()

    def start_sum(self, counts: Sequence[int], name: str) -> Callable[[], list[int]]:
        """Start a sum in the background."""
        if name not in self._sums:
            options = {"op": self._hvd.Sum, "name": name, "ignore_name_scope": True}

            def add(tensor: tf.Tensor) -> tf.Tensor:
                with tf.device("CPU:0"):
                    return self._hvd.allreduce(tensor, **options)

            self._sums[name] = tf.function(add, autograph=False)
        tensor, call = tf.constant(list(counts), "int32"), self._sums[name]
        # TensorFlow returns from a graph only when its operations have finished: a thread waits for it.
        return self._thread.submit(lambda: call(tensor).numpy().tolist()).result


class GPUs:
    """Implements ``GPUs``."""

    def count(self) -> int:
        """Return the number of GPUs."""
        return len(tf.config.list_physical_devices("GPU"))

    def in_use(self) -> bool:
        """Return False: TensorFlow copies tensors to the host by itself where Horovod's operations are not on GPUs."""
        return False

    def bind(self, local_rank: int) -> None:
        """Make the local rank's GPU the only one that is visible."""
        gpu = tf.config.list_physical_devices("GPU")[local_rank % self.count()]
        tf.config.set_visible_devices(gpu, "GPU")
        tf.config.experimental.set_memory_growth(gpu, True)

    def copy_to(self, array: np.ndarray, local_rank: int) -> tf.Tensor:
        """Return ``array`` on the GPU that ``bind`` has made visible."""
        with tf.device("GPU:0"):
            return tf.constant(array)


class Horovod:
    """Implements ``HorovodSupport``."""

    def __init__(self) -> None:
        self.gpus = GPUs()

    def operations(self, hvd: ModuleType, on_host: bool) -> Operations:
        """Return the collectives of ``hvd``."""
        return Operations(hvd, on_host)

    def messages(self, hvd: ModuleType) -> Messages:
        """Return the messages over ``hvd``."""
        return Messages(hvd)


def _options(operation: str, name: str, members: Any) -> dict[str, Any]:
    """Return the options of an operation, above all the name by which ranks match it.

    The operation is part of the name, since TensorFlow numbers names that its own operations have taken, and Horovod's
    thread ends at a reduce-scatter under a name that an all-reduce had before. Without the name scope, the name is the
    same in every graph.
    """
    return {"name": f"hvdlm.{operation}.{name}", "process_set": members, "ignore_name_scope": True}
