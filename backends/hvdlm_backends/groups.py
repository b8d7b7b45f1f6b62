"""Groups whose calls are counted and recorded; the one over ``horovod.torch`` or ``horovod.tensorflow``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import ModuleType
from typing import Any

from hvdlm.diagnostics.flight_recorder import FlightRecorder
from hvdlm.protocols.group import Done, Handle
from hvdlm.protocols.types import Traffic

_POLL_SECONDS, _POLL_SHARE = 5e-5, 0.03  # of the time waited so far: long waits are looked at rarely


class _Waiting:
    """A torch collective under way; waiting for it is timed."""

    def __init__(self, hvd: ModuleType, handle: Any, traffic: Traffic, ended: Callable[[], None]) -> None:
        self._hvd, self._handle, self._traffic, self._ended = hvd, handle, traffic, ended
        self._sleeps = hasattr(hvd.mpi_ops.mpi_lib, "horovod_torch_wait_sleeps")

    def wait(self) -> Any:
        """Return the result."""
        started = time.perf_counter()
        # synchronize spins where Horovod is not the one of make setup (hvdlm_horovod.patches), and takes the core
        # from the thread that communicates; so does looking too often.
        while not (self._sleeps or self._hvd.poll(self._handle)):
            time.sleep(max(_POLL_SECONDS, _POLL_SHARE * (time.perf_counter() - started)))
        result = _first(self._hvd.synchronize(self._handle))
        self._traffic.seconds += time.perf_counter() - started
        self._ended()
        return result


_THREADS = ThreadPoolExecutor(16, "hvdlm-broadcast")


class _Threaded:
    """A TensorFlow collective under way in a thread of its own; waiting for it is timed."""

    def __init__(self, call: Callable[[], Any], traffic: Traffic, ended: Callable[[], None]) -> None:
        self._future, self._traffic, self._ended = _THREADS.submit(call), traffic, ended

    def wait(self) -> Any:
        """Return the result."""
        started = time.perf_counter()
        result = self._future.result()
        self._traffic.seconds += time.perf_counter() - started
        self._ended()
        return result


class CountedGroup:
    """A group that counts calls and bytes, and writes the flight recorder (``Ledger``), when a call is made.

    Inside a TensorFlow graph a call is made once, when the graph is traced: who runs the graph counts its runs.
    """

    def __init__(self, ranks: Sequence[int], recorder: FlightRecorder | None = None) -> None:
        self.ranks = tuple(ranks)
        self.traffic: dict[str, Traffic] = {}
        self._recorder = recorder or FlightRecorder()
        self._members = self._recorder.members(self.ranks)

    def _begin(self, operation: str, name: str, *tensors: Any) -> tuple[Traffic, int]:
        """Record that a collective begins; return its counter and its number, 0 while a graph is traced."""
        traffic = self.traffic.setdefault(f"{name.partition('.')[0]}/{operation}", Traffic())
        traffic.calls += 1
        traffic.bytes += sum(_bytes(tensor) for tensor in tensors)
        return traffic, self._recorder.begin(operation, name, self._members, tensors)


class HorovodGroup(CountedGroup):
    """The collectives of one process set."""

    def __init__(
        self, hvd: ModuleType, ranks: Sequence[int], process_set: Any, recorder: FlightRecorder | None = None
    ) -> None:
        super().__init__(ranks, recorder)
        self._hvd, self._set = hvd, process_set
        # TensorFlow's operations take this to keep the same name in every graph; torch's don't know it.
        self._broadcasts: dict[tuple[str, int], Callable[[Any], Any]] = {}
        self._named = {"ignore_name_scope": True} if hvd.__name__.endswith("tensorflow") else {}

    def _count(self, operation: str, name: str, *tensors: Any) -> tuple[Traffic, Callable[[], None]]:
        """Record that a collective begins; return its counter, and what is to be called when it has ended."""
        traffic, number = self._begin(operation, name, *tensors)
        return traffic, partial(self._recorder.end, number)

    def _label(self, operation: str, name: str) -> str:
        """Return the name that ranks agree on; torch adds the operation itself.

        TensorFlow numbers names that its own operations have taken. A reduce-scatter of a name that an all-reduce had
        before ends Horovod's thread.
        """
        return f"hvdlm.{operation}.{name}" if self._named else name

    def _start(self, operation: str, tensor: Any, name: str, **options: Any) -> Handle:
        """Call Horovod's asynchronous form in torch; in TensorFlow the graph makes every operation asynchronous."""
        traffic, ended = self._count(operation, name, tensor)
        options = {"name": self._label(operation, name), "process_set": self._set, **self._named, **options}
        call = operation.replace("_", "")
        if self._named:
            result = _first(getattr(self._hvd, call)(tensor, **options))
            ended()  # inside a graph, it ends with the graph
            if operation == "reduce_scatter" and tensor.shape[0] and tensor.shape[0] % len(self.ranks) == 0:
                # A graph has to know, so that what is then done with the part can be counted.
                result.set_shape([tensor.shape[0] // len(self.ranks), *tensor.shape[1:]])
            return Done(result)
        in_place = "_async_" if operation == "all_reduce" else "_async"
        return _Waiting(self._hvd, getattr(self._hvd, call + in_place)(tensor, **options), traffic, ended)

    def all_reduce_async(self, tensor: Any, name: str, op: str = "sum") -> Handle:
        """Start the sum; see ``interfaces.Group``."""
        return self._start("all_reduce", tensor, name, op=self._hvd.Adasum if op == "adasum" else self._hvd.Sum)

    def all_gather_async(self, tensor: Any, name: str) -> Handle:
        """Start the concatenation; see ``interfaces.Group``."""
        return self._start("all_gather", tensor, name)

    def all_to_all_async(self, tensor: Any, name: str) -> Handle:
        """Start the exchange of parts; see ``interfaces.Group``."""
        return self._start("all_to_all", tensor, name)

    def reduce_scatter_async(self, tensor: Any, name: str) -> Handle:
        """Start the sum and its scattering; see ``interfaces.Group``."""
        return self._start("reduce_scatter", tensor, name, op=self._hvd.Sum)

    def broadcast_async(self, tensor: Any, root: int, name: str) -> Handle:
        """Start the broadcast; see ``interfaces.Group``."""
        if not self._named:
            return self._start("broadcast", tensor, name, root_rank=self.ranks[root])
        # Outside of a graph, TensorFlow's operations block: a thread waits instead.
        traffic, ended = self._count("broadcast", name, tensor)
        return _Threaded(partial(self._broadcast(name, root), tensor), traffic, ended)

    def _broadcast(self, name: str, root: int) -> Callable[[Any], Any]:
        """Return the broadcast of this name, in a graph of its own where the framework is TensorFlow.

        Outside of graphs, TensorFlow takes an operation that it has made before even if that had another name.
        """
        options = {"name": self._label("broadcast", name), "process_set": self._set, **self._named}
        call = partial(self._hvd.broadcast, root_rank=self.ranks[root], **options)
        if not self._named:
            return call
        if (name, root) not in self._broadcasts:
            self._broadcasts[name, root] = sys.modules["tensorflow"].function(call, autograph=False)
        return self._broadcasts[name, root]

    def _timed(self, operation: str, name: str, tensors: Sequence[Any], call: Callable[[], Any]) -> Any:
        traffic, ended = self._count(operation, name, *tensors)
        started = time.perf_counter()
        result = call()
        traffic.seconds += time.perf_counter() - started
        ended()
        return result

    def all_reduce(self, tensors: Sequence[Any], name: str) -> list[Any]:
        """Return the sums; see ``interfaces.Group``."""
        if len(tensors) == 1:
            return [self.all_reduce_async(tensors[0], name).wait()]
        if self._named:
            options = {
                "op": self._hvd.Sum,
                "name": self._label("all_reduce", name),
                "process_set": self._set,
                **self._named,
            }
            call = partial(self._hvd.grouped_allreduce, list(tensors), **options)
            return self._timed("all_reduce", name, tensors, lambda: list(call()))
        # One tensor costs Horovod far less than its own fusing of many, each with a handle.
        utils, found = sys.modules["torch._utils"], list(tensors)
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):  # in the same order on all ranks
            places = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
            parts = [tensors[i] for i in places]
            whole = self.all_reduce_async(utils._flatten_dense_tensors(parts), f"{name}.{dtype}").wait()
            for i, part in zip(places, utils._unflatten_dense_tensors(whole, parts), strict=True):
                found[i] = part
        return found

    def all_gather(self, tensor: Any, name: str) -> Any:
        """Return the concatenation; see ``interfaces.Group``."""
        return self.all_gather_async(tensor, name).wait()

    def reduce_scatter(self, tensor: Any, name: str) -> Any:
        """Return this member's part of the sum; see ``interfaces.Group``."""
        return self.reduce_scatter_async(tensor, name).wait()

    def broadcast(self, tensor: Any, root: int, name: str) -> Any:
        """Return the root's tensor; see ``interfaces.Group``."""
        return self._timed("broadcast", name, [tensor], partial(self._broadcast(name, root), tensor))

    def all_to_all(self, tensor: Any, name: str) -> Any:
        """Return the exchanged parts; see ``interfaces.Group``."""
        return self.all_to_all_async(tensor, name).wait()

    def barrier(self) -> None:
        """Wait for all members."""
        if not self._named:
            self._timed("barrier", "barrier", [], lambda: self._hvd.barrier(process_set=self._set))
            return
        # horovod.tensorflow has no barrier: a sum that every member awaits is one.
        token = sys.modules["tensorflow"].zeros(1)
        options = {"op": self._hvd.Sum, "name": "barrier", "process_set": self._set, **self._named}
        self._timed("barrier", "barrier", [], lambda: self._hvd.allreduce(token, **options).numpy())


def _first(result: Any) -> Any:
    """Return the tensor of an all-to-all's (tensor, splits); any other tensor as it is."""
    return result[0] if isinstance(result, tuple) else result


def _bytes(tensor: Any) -> int:
    """Return the bytes of a tensor of any framework; 0 where a traced shape is open."""
    if hasattr(tensor, "element_size"):
        return tensor.numel() * tensor.element_size()
    if not hasattr(tensor.shape, "num_elements"):
        return int(tensor.nbytes)
    elements = tensor.shape.num_elements()
    return (elements or 0) * tensor.dtype.size
