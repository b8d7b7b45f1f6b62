"""Groups that count and record their collectives; groups over Horovod's operations of a framework."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from hvdlm.diagnostics.flight_recorder import FlightRecorder
from hvdlm.errors import HvdlmError
from hvdlm.protocols.group import BlockingForms, Done, Handle
from hvdlm.protocols.types import Tensor, Traffic
from hvdlm_backends.horovod_support import HorovodOperations


class _TimedHandle:
    """A collective in flight; waiting for it is timed."""

    def __init__(self, handle: Handle, traffic: Traffic, ended: Callable[[], None]) -> None:
        self._handle = handle
        self._traffic = traffic
        self._ended = ended

    def wait(self) -> Tensor:
        """Return the result."""
        started = time.perf_counter()
        result = self._handle.wait()
        self._traffic.seconds += time.perf_counter() - started
        self._ended()
        return result

    def finish(self) -> None:
        """Wait now, on behalf of whoever asks for the result later."""
        self._handle = Done(self.wait())


class _HostHandle(_TimedHandle):
    """A collective in flight over host memory, which has ended for this rank where it fails, too."""

    def wait(self) -> Tensor:
        """Return the result."""
        started = time.perf_counter()
        try:
            return self._handle.wait()
        finally:
            self._traffic.seconds += time.perf_counter() - started
            self._ended()


class CountedGroup(BlockingForms):
    """A group that counts calls and bytes and records its collectives in the flight recorder.

    A backend starts each of its collectives by ``counted``. In a TensorFlow graph this happens once, when the graph is
    traced: the graph's caller counts its later runs.
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

    def counted(self, operation: str, name: str, tensors: Sequence[Tensor], start: Callable[[], Handle]) -> Handle:
        """Start a collective by ``start()``; it is counted, recorded, and timed while it is waited for.

        ``operation``: the method's name without ``_async``; ``tensors``: what this rank hands over.
        """
        traffic, number = self._begin(operation, name, *tensors)
        handle = start()
        return _HostHandle(handle, traffic, self._end(number)) if number else handle  # a graph waits itself

    def all_reduce(self, tensors: Sequence[Tensor], name: str) -> list[Tensor]:
        """Return the sums, one collective for each dtype where the backend joins tensors."""
        if len(tensors) == 1:
            return [self._sum(tensors[0], name)]
        sums = list(tensors)
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):  # in the same order on all ranks
            indices = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
            same_dtype = [tensors[i] for i in indices]
            for index, total in zip(indices, self._sum_together(same_dtype, f"{name}.{dtype}"), strict=True):
                sums[index] = total
        return sums

    def _sum(self, tensor: Tensor, name: str) -> Tensor:
        """Return the sum of one tensor."""
        return self.all_reduce_async(tensor, name).wait()

    def _sum_together(self, tensors: Sequence[Tensor], name: str) -> list[Tensor]:
        """Return the sums of several tensors of one dtype: of each by itself, unless a backend joins them."""
        return [self._sum(tensor, f"{name}.{index}") for index, tensor in enumerate(tensors)]

    def _end(self, number: int) -> Callable[[], None]:
        """Return the function to call when the collective of this sequence number has ended."""
        return partial(self._recorder.end, number)


class HorovodGroup(CountedGroup):
    """The collectives of one process set of Horovod; ``bf16``: whether this Horovod sends and sums bfloat16."""

    def __init__(
        self,
        operations: HorovodOperations,
        ranks: Sequence[int],
        members: Any,
        recorder: FlightRecorder | None = None,
        bf16: bool = True,
    ) -> None:
        super().__init__(ranks, recorder)
        self._operations = operations
        self._set = members
        self._bf16 = bf16
        self._unfinished: dict[tuple[str, str], _TimedHandle] = {}  # what nobody has waited for, by operation, name

    def _begin(self, operation: str, name: str, *tensors: Any) -> tuple[Traffic, int]:
        if not self._bf16 and any("bfloat16" in str(tensor.dtype) for tensor in tensors):
            raise HvdlmError(
                f"this Horovod can't send {name} in bfloat16, which only hvdlm's build of it can: python -m hvdlm "
                "horovod build, --train.precision fp32, or --backend mpi4py."
            )
        return super()._begin(operation, name, *tensors)

    def _start(self, operation: str, tensor: Tensor, name: str, op: str = "sum") -> Handle:
        """Start an operation without waiting for its result."""
        return self._in_flight(
            operation, tensor, name, lambda: self._operations.start(operation, tensor, name, self._set, op)
        )

    def _in_flight(self, operation: str, tensor: Tensor, name: str, start: Callable[[], Handle]) -> Handle:
        """Start an operation by ``start()``, after one of its name that nobody has waited for.

        Such as the one in flight of a training that was given up: Horovod refuses another of its name on those ranks
        on which it has not ended yet.
        """
        key = operation, name
        if key in self._unfinished:
            self._unfinished[key].finish()
        traffic, number = self._begin(operation, name, tensor)
        handle = start()
        if isinstance(handle, Done):  # a collective in a graph is recorded as ended with the graph
            self._recorder.end(number)
            return handle

        def ended() -> None:
            if self._unfinished.get(key) is timed:
                del self._unfinished[key]
            self._recorder.end(number)

        self._unfinished[key] = timed = _TimedHandle(handle, traffic, ended)
        return timed

    def _timed(self, operation: str, name: str, tensors: Sequence[Tensor], call: Callable[[], Any]) -> Any:
        traffic, number = self._begin(operation, name, *tensors)
        started = time.perf_counter()
        result = call()
        traffic.seconds += time.perf_counter() - started
        self._recorder.end(number)
        return result

    def all_reduce_async(self, tensor: Tensor, name: str, op: str = "sum") -> Handle:
        """Start a sum."""
        return self._start("all_reduce", tensor, name, op)

    def all_gather_async(self, tensor: Tensor, name: str) -> Handle:
        """Start a concatenation."""
        return self._start("all_gather", tensor, name)

    def reduce_scatter_async(self, tensor: Tensor, name: str) -> Handle:
        """Start a reduce-scatter."""
        return self._start("reduce_scatter", tensor, name)

    def broadcast_async(self, tensor: Tensor, root: int, name: str) -> Handle:
        """Start a broadcast."""
        return self._in_flight(
            "broadcast",
            tensor,
            name,
            lambda: self._operations.start_broadcast(tensor, self.ranks[root], name, self._set),
        )

    def all_to_all_async(self, tensor: Tensor, name: str) -> Handle:
        """Start an all-to-all."""
        return self._start("all_to_all", tensor, name)

    def _sum_together(self, tensors: Sequence[Tensor], name: str) -> list[Tensor]:
        call = partial(self._operations.sum_together, tensors, name, self._set)
        return self._timed("all_reduce", name, tensors, call)

    def broadcast(self, tensor: Tensor, root: int, name: str) -> Tensor:
        """Return the root's tensor."""
        call = partial(self._operations.broadcast, tensor, self.ranks[root], name, self._set)
        return self._timed("broadcast", name, [tensor], call)

    def barrier(self) -> None:
        """Wait for all members."""
        self._timed("barrier", "barrier", [], partial(self._operations.barrier, self._set))


def _bytes(tensor: Any) -> int:
    """Return the bytes of a tensor of any framework; 0 while a traced shape is unknown."""
    if hasattr(tensor, "element_size"):
        return tensor.numel() * tensor.element_size()
    if not hasattr(tensor.shape, "num_elements"):
        return int(tensor.nbytes)
    elements = tensor.shape.num_elements()
    return (elements or 0) * tensor.dtype.size
