"""A Group over MPI on host memory: a framework's tensors become arrays, which a lane's thread hands to MPI."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from hvdlm.diagnostics.flight_recorder import FlightRecorder
from hvdlm.protocols.framework import HostCollective, HostTensors
from hvdlm.protocols.group import Handle
from hvdlm.protocols.types import Traffic
from hvdlm_backends import mpi_collectives
from hvdlm_backends.groups import CountedGroup
from hvdlm_backends.lanes import Lane
from hvdlm_backends.named_messages import NamedMessages

Shape = tuple[int | None, ...]


class _Timed:
    """A collective under way outside of graphs; waiting for it is timed."""

    def __init__(self, handle: Handle, traffic: Traffic, ended: Callable[[], None]) -> None:
        self._handle, self._traffic, self._ended = handle, traffic, ended

    def wait(self) -> Any:
        """Return the result."""
        started = time.perf_counter()
        try:
            return self._handle.wait()
        finally:
            self._traffic.seconds += time.perf_counter() - started
            self._ended()


class HostGroup(CountedGroup):
    """The collectives of one communicator.

    ``in_place``: whether a sum may overwrite what was summed (``Framework.in_place``).
    """

    def __init__(
        self,
        lane: Lane,
        messages: NamedMessages,
        tensors: HostTensors,
        in_place: bool,
        recorder: FlightRecorder | None = None,
    ) -> None:
        super().__init__(lane.ranks, recorder)
        self._lane, self._messages, self._tensors, self._in_place = lane, messages, tensors, in_place

    def _start(
        self, operation: str, tensor: Any, name: str, call: Callable[..., np.ndarray], shape: Shape, now: bool
    ) -> Handle:
        """Start ``call(array, communicator)``; ``shape``: of the result, None where ranks differ in it."""
        traffic, number = self._begin(operation, name, tensor)
        handle = self._tensors.through(tensor, self._collective(operation, name, call, now), shape)
        return _Timed(handle, traffic, partial(self._recorder.end, number)) if number else handle

    def _collective(self, operation: str, name: str, call: Callable[..., np.ndarray], now: bool) -> HostCollective:
        """Return what hands ``call`` on an array to the lane; ranks compare what they have come to."""

        def submit(array: np.ndarray, arrived: Callable[[], None] | None) -> Handle:
            alike = array.shape[1:] if operation == "all_gather" else array.shape
            signature = f"{operation} {name} {array.dtype}{list(alike)}"
            return self._lane.submit(partial(call, array), signature, now, arrived)

        return submit

    def _all_reduce(self, tensor: Any, name: str, op: str, now: bool) -> Handle:
        summed = mpi_collectives.adasum if op == "adasum" else mpi_collectives.all_reduce
        call = _call(summed, self._in_place)
        return self._start("all_reduce", tensor, name, call, tuple(tensor.shape), now)

    def _sum_together(self, tensors: Sequence[Any], name: str) -> list[Any]:
        traffic, number = self._begin("all_reduce", name, *tensors)
        collective = self._collective("all_reduce", name, _call(mpi_collectives.all_reduce, self._in_place), True)
        handle = self._tensors.together(tensors, collective)
        return (_Timed(handle, traffic, partial(self._recorder.end, number)) if number else handle).wait()

    def _all_gather(self, tensor: Any, name: str, now: bool) -> Handle:
        shape = (None, *tuple(tensor.shape)[1:])
        return self._start("all_gather", tensor, name, mpi_collectives.all_gather, shape, now)

    def _reduce_scatter(self, tensor: Any, name: str, now: bool) -> Handle:
        rows, size = tensor.shape[0], len(self.ranks)
        even = rows is not None and rows % size == 0
        shape = (rows // size if even else None, *tuple(tensor.shape)[1:])
        return self._start("reduce_scatter", tensor, name, mpi_collectives.reduce_scatter, shape, now)

    def _broadcast(self, tensor: Any, root: int, name: str, now: bool) -> Handle:
        traffic, number = self._begin("broadcast", name, tensor)

        def post(array: np.ndarray, arrived: Callable[[], None] | None) -> Handle:
            if arrived is not None:
                arrived()
            return self._messages.broadcast(array, root, name, f"broadcast {name} {array.dtype}{list(array.shape)}")

        call = _call(mpi_collectives.broadcast, root)
        collective = self._collective("broadcast", name, call, now) if now else post
        handle = self._tensors.through(tensor, collective, tuple(tensor.shape))
        return _Timed(handle, traffic, partial(self._recorder.end, number)) if number else handle

    def _all_to_all(self, tensor: Any, name: str, now: bool) -> Handle:
        return self._start("all_to_all", tensor, name, mpi_collectives.all_to_all, tuple(tensor.shape), now)

    def all_reduce_async(self, tensor: Any, name: str, op: str = "sum") -> Handle:
        """Start the sum; see ``interfaces.Group``."""
        return self._all_reduce(tensor, name, op, False)

    def all_gather_async(self, tensor: Any, name: str) -> Handle:
        """Start the concatenation; see ``interfaces.Group``."""
        return self._all_gather(tensor, name, False)

    def reduce_scatter_async(self, tensor: Any, name: str) -> Handle:
        """Start the sum and its scattering; see ``interfaces.Group``."""
        return self._reduce_scatter(tensor, name, False)

    def broadcast_async(self, tensor: Any, root: int, name: str) -> Handle:
        """Start the broadcast; see ``interfaces.Group``."""
        return self._broadcast(tensor, root, name, False)

    def all_to_all_async(self, tensor: Any, name: str) -> Handle:
        """Start the exchange of equal parts; see ``interfaces.Group``."""
        return self._all_to_all(tensor, name, False)

    def all_reduce(self, tensors: Sequence[Any], name: str) -> list[Any]:
        """Return the sums, one collective for each dtype; see ``interfaces.Group``."""
        if len(tensors) == 1:
            return [self._all_reduce(tensors[0], name, "sum", True).wait()]
        sums = list(tensors)
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):  # in the same order on all ranks
            places = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
            members = [tensors[i] for i in places]
            for place, total in zip(places, self._sum_together(members, f"{name}.{dtype}"), strict=True):
                sums[place] = total
        return sums

    def all_gather(self, tensor: Any, name: str) -> Any:
        """Return the concatenation; see ``interfaces.Group``."""
        return self._all_gather(tensor, name, True).wait()

    def reduce_scatter(self, tensor: Any, name: str) -> Any:
        """Return this member's part of the sum; see ``interfaces.Group``."""
        return self._reduce_scatter(tensor, name, True).wait()

    def broadcast(self, tensor: Any, root: int, name: str) -> Any:
        """Return the root's tensor; see ``interfaces.Group``."""
        return self._broadcast(tensor, root, name, True).wait()

    def all_to_all(self, tensor: Any, name: str) -> Any:
        """Return the exchanged parts; see ``interfaces.Group``."""
        return self._all_to_all(tensor, name, True).wait()

    def barrier(self) -> None:
        """Wait for all members."""
        traffic, number = self._begin("barrier", "barrier")
        job = self._lane.submit(mpi_collectives.barrier, "barrier", True)
        _Timed(job, traffic, partial(self._recorder.end, number)).wait()


def _call(function: Callable[..., np.ndarray], setting: Any) -> Callable[..., np.ndarray]:
    """Return ``function`` with its setting, which stands between the array and the communicator."""
    return lambda array, communicator: function(array, setting, communicator)
