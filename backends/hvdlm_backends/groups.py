"""Groups that count and record their collectives; groups over ``horovod.torch`` and ``horovod.tensorflow``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import ModuleType
from typing import Any

from hvdlm.diagnostics.flight_recorder import FlightRecorder
from hvdlm.protocols.group import Done, Group, Handle
from hvdlm.protocols.types import Traffic

_POLL_SECONDS = 5e-5  # shortest interval between two polls
_POLL_FRACTION = 0.03  # of the time waited so far: the longer the wait, the rarer the polls


class _TorchHandle:
    """A torch collective in flight; waiting for it is timed."""

    def __init__(self, hvd: ModuleType, handle: Any, traffic: Traffic, ended: Callable[[], None]) -> None:
        self._hvd = hvd
        self._handle = handle
        self._traffic = traffic
        self._ended = ended
        self._sleeps = hasattr(hvd.mpi_ops.mpi_lib, "horovod_torch_wait_sleeps")

    def wait(self) -> Any:
        """Return the result."""
        started = time.perf_counter()
        # Where Horovod is not hvdlm's build (hvdlm_horovod.patches), synchronize spins and takes the core from the
        # thread that communicates; polling too often does so, too.
        while not (self._sleeps or self._hvd.poll(self._handle)):
            time.sleep(max(_POLL_SECONDS, _POLL_FRACTION * (time.perf_counter() - started)))
        result = _first(self._hvd.synchronize(self._handle))
        self._traffic.seconds += time.perf_counter() - started
        self._ended()
        return result


_THREADS = ThreadPoolExecutor(16, "hvdlm-broadcast")


class _ThreadHandle:
    """A TensorFlow collective that blocks a thread of its own; waiting for it is timed."""

    def __init__(self, call: Callable[[], Any], traffic: Traffic, ended: Callable[[], None]) -> None:
        self._future = _THREADS.submit(call)
        self._traffic = traffic
        self._ended = ended

    def wait(self) -> Any:
        """Return the result."""
        started = time.perf_counter()
        result = self._future.result()
        self._traffic.seconds += time.perf_counter() - started
        self._ended()
        return result


class CountedGroup:
    """A group that counts calls and bytes and records its collectives in the flight recorder (``Ledger``).

    In a TensorFlow graph this happens once, when the graph is traced: the graph's caller counts its later runs.
    """

    def __init__(self, ranks: Sequence[int], recorder: FlightRecorder | None = None) -> None:
        self.ranks = tuple(ranks)
        self.traffic: dict[str, Traffic] = {}
        self._recorder = recorder or FlightRecorder()
        self._members = self._recorder.recorded_group(self.ranks)

    def _begin(self, operation: str, name: str, *tensors: Any) -> tuple[Traffic, int]:
        """Record that a collective begins; return its counter and its sequence number, 0 while a graph is traced."""
        traffic = self.traffic.setdefault(f"{name.partition('.')[0]}/{operation}", Traffic())
        traffic.calls += 1
        traffic.bytes += sum(_bytes(tensor) for tensor in tensors)
        return traffic, self._recorder.begin(operation, name, self._members, tensors)


class HorovodGroup(CountedGroup):
    """The collectives of one process set; subclasses call Horovod's operations of one framework."""

    def __init__(
        self, hvd: ModuleType, ranks: Sequence[int], process_set: Any, recorder: FlightRecorder | None = None
    ) -> None:
        super().__init__(ranks, recorder)
        self._hvd = hvd
        self._set = process_set

    def _count(self, operation: str, name: str, *tensors: Any) -> tuple[Traffic, Callable[[], None]]:
        """Record that a collective begins; return its counter and the function to call when it has ended."""
        traffic, number = self._begin(operation, name, *tensors)
        return traffic, partial(self._recorder.end, number)

    def _timed(self, operation: str, name: str, tensors: Sequence[Any], call: Callable[[], Any]) -> Any:
        traffic, ended = self._count(operation, name, *tensors)
        started = time.perf_counter()
        result = call()
        traffic.seconds += time.perf_counter() - started
        ended()
        return result

    def _start(self, operation: str, tensor: Any, name: str, **options: Any) -> Handle:
        """Start an operation without waiting for its result."""
        raise NotImplementedError

    def all_reduce_async(self, tensor: Any, name: str, op: str = "sum") -> Handle:
        """Start a sum."""
        return self._start("all_reduce", tensor, name, op=self._hvd.Adasum if op == "adasum" else self._hvd.Sum)

    def all_gather_async(self, tensor: Any, name: str) -> Handle:
        """Start a concatenation."""
        return self._start("all_gather", tensor, name)

    def all_to_all_async(self, tensor: Any, name: str) -> Handle:
        """Start an all-to-all."""
        return self._start("all_to_all", tensor, name)

    def reduce_scatter_async(self, tensor: Any, name: str) -> Handle:
        """Start a reduce-scatter."""
        return self._start("reduce_scatter", tensor, name, op=self._hvd.Sum)

    def all_reduce(self, tensors: Sequence[Any], name: str) -> list[Any]:
        """Return the sums."""
        if len(tensors) == 1:
            return [self.all_reduce_async(tensors[0], name).wait()]
        return self._all_reduce_several(tensors, name)

    def _all_reduce_several(self, tensors: Sequence[Any], name: str) -> list[Any]:
        raise NotImplementedError

    def all_gather(self, tensor: Any, name: str) -> Any:
        """Return the concatenation."""
        return self.all_gather_async(tensor, name).wait()

    def reduce_scatter(self, tensor: Any, name: str) -> Any:
        """Return this member's shard of the sum."""
        return self.reduce_scatter_async(tensor, name).wait()

    def all_to_all(self, tensor: Any, name: str) -> Any:
        """Return the exchanged shards."""
        return self.all_to_all_async(tensor, name).wait()


class TorchGroup(HorovodGroup):
    """A group over ``horovod.torch``."""

    def _start(self, operation: str, tensor: Any, name: str, **options: Any) -> Handle:
        traffic, ended = self._count(operation, name, tensor)
        suffix = "_async_" if operation == "all_reduce" else "_async"  # sums are computed in place
        start = getattr(self._hvd, operation.replace("_", "") + suffix)
        return _TorchHandle(self._hvd, start(tensor, name=name, process_set=self._set, **options), traffic, ended)

    def broadcast_async(self, tensor: Any, root: int, name: str) -> Handle:
        """Start a broadcast."""
        return self._start("broadcast", tensor, name, root_rank=self.ranks[root])

    def broadcast(self, tensor: Any, root: int, name: str) -> Any:
        """Return the root's tensor."""
        options = {"root_rank": self.ranks[root], "name": name, "process_set": self._set}
        return self._timed("broadcast", name, [tensor], partial(self._hvd.broadcast, tensor, **options))

    def _all_reduce_several(self, tensors: Sequence[Any], name: str) -> list[Any]:
        """Sum one flat tensor for each dtype: far cheaper than Horovod's fusion with its handle for each tensor."""
        utils, sums = sys.modules["torch._utils"], list(tensors)
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):  # in the same order on all ranks
            indices = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
            same_dtype = [tensors[i] for i in indices]
            flat = self.all_reduce_async(utils._flatten_dense_tensors(same_dtype), f"{name}.{dtype}").wait()
            for i, total in zip(indices, utils._unflatten_dense_tensors(flat, same_dtype), strict=True):
                sums[i] = total
        return sums

    def barrier(self) -> None:
        """Wait for all members."""
        self._timed("barrier", "barrier", [], lambda: self._hvd.barrier(process_set=self._set))


class TensorFlowGroup(HorovodGroup):
    """A group over ``horovod.tensorflow``, whose operations block outside of graphs and run asynchronously in them."""

    def __init__(
        self, hvd: ModuleType, ranks: Sequence[int], process_set: Any, recorder: FlightRecorder | None = None
    ) -> None:
        super().__init__(hvd, ranks, process_set, recorder)
        self._broadcasts: dict[tuple[str, int], Callable[[Any], Any]] = {}

    def _options(self, operation: str, name: str) -> dict[str, Any]:
        """Return the options of an operation, above all the name by which ranks match it.

        The operation is part of the name, since TensorFlow numbers names that its own operations have taken, and
        Horovod's thread ends at a reduce-scatter under a name that an all-reduce had before. Without the name scope,
        the name is the same in every graph.
        """
        return {"name": f"hvdlm.{operation}.{name}", "process_set": self._set, "ignore_name_scope": True}

    def _start(self, operation: str, tensor: Any, name: str, **options: Any) -> Handle:
        _, ended = self._count(operation, name, tensor)
        options = {**self._options(operation, name), **options}
        result = _first(getattr(self._hvd, operation.replace("_", ""))(tensor, **options))
        ended()  # a collective in a graph is recorded as ended with the graph
        if operation == "reduce_scatter" and tensor.shape[0] and tensor.shape[0] % len(self.ranks) == 0:
            # Horovod leaves the length open in a graph, and later collectives on the shard are counted by its shape.
            result.set_shape([tensor.shape[0] // len(self.ranks), *tensor.shape[1:]])
        return Done(result)

    def broadcast_async(self, tensor: Any, root: int, name: str) -> Handle:
        """Start a broadcast in a thread."""
        traffic, ended = self._count("broadcast", name, tensor)
        return _ThreadHandle(partial(self._broadcast(name, root), tensor), traffic, ended)

    def broadcast(self, tensor: Any, root: int, name: str) -> Any:
        """Return the root's tensor."""
        return self._timed("broadcast", name, [tensor], partial(self._broadcast(name, root), tensor))

    def _broadcast(self, name: str, root: int) -> Callable[[Any], Any]:
        """Return the broadcast of this name as a graph of its own.

        Outside of graphs, TensorFlow reuses an operation that it has made before even if that had another name.
        """
        if (name, root) not in self._broadcasts:
            call = partial(self._hvd.broadcast, root_rank=self.ranks[root], **self._options("broadcast", name))
            self._broadcasts[name, root] = sys.modules["tensorflow"].function(call, autograph=False)
        return self._broadcasts[name, root]

    def _all_reduce_several(self, tensors: Sequence[Any], name: str) -> list[Any]:
        options = {"op": self._hvd.Sum, **self._options("all_reduce", name)}
        call = partial(self._hvd.grouped_allreduce, list(tensors), **options)
        return self._timed("all_reduce", name, tensors, lambda: list(call()))

    def barrier(self) -> None:
        """Wait for all members, by a sum: ``horovod.tensorflow`` has no barrier."""
        token = sys.modules["tensorflow"].zeros(1)
        options = {**self._options("all_reduce", "barrier"), "op": self._hvd.Sum, "name": "barrier"}
        self._timed("barrier", "barrier", [], lambda: self._hvd.allreduce(token, **options).numpy())


def make_group(
    hvd: ModuleType, ranks: Sequence[int], process_set: Any, recorder: FlightRecorder | None = None
) -> Group:
    """Return a group over the operations of the framework that ``hvd`` belongs to."""
    if hvd.__name__.endswith("tensorflow"):
        return TensorFlowGroup(hvd, ranks, process_set, recorder)
    return TorchGroup(hvd, ranks, process_set, recorder)


def _first(result: Any) -> Any:
    """Return the tensor of an all-to-all's result (tensor, splits), or the result itself."""
    return result[0] if isinstance(result, tuple) else result


def _bytes(tensor: Any) -> int:
    """Return the bytes of a tensor of any framework; 0 while a traced shape is unknown."""
    if hasattr(tensor, "element_size"):
        return tensor.numel() * tensor.element_size()
    if not hasattr(tensor.shape, "num_elements"):
        return int(tensor.nbytes)
    elements = tensor.shape.num_elements()
    return (elements or 0) * tensor.dtype.size
