"""Group over MPI from host memory: tensors become arrays, which the thread of a lane passes to MPI."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from hvdlm.diagnostics.flight_recorder import FlightRecorder
from hvdlm.protocols.framework import HostCollective, HostTensors
from hvdlm.protocols.group import Handle
from hvdlm_backends import mpi_collectives
from hvdlm_backends.groups import CountedGroup
from hvdlm_backends.lanes import Lane
from hvdlm_backends.named_messages import NamedMessages

Shape = tuple[int | None, ...]


class HostGroup(CountedGroup):
    """The collectives of one communicator.

    ``in_place``: whether a sum may overwrite its input (``Framework.in_place``).
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
        self._lane = lane
        self._messages = messages
        self._tensors = tensors
        self._in_place = in_place

    def _start(
        self, operation: str, tensor: Any, name: str, call: Callable[..., np.ndarray], shape: Shape, now: bool
    ) -> Handle:
        """Start ``call(array, communicator)``; ``shape``: of the result, with None where ranks may differ."""
        collective = self._collective(operation, name, call, now)
        return self.counted(operation, name, [tensor], lambda: self._tensors.through(tensor, collective, shape))

    def _collective(self, operation: str, name: str, call: Callable[..., np.ndarray], now: bool) -> HostCollective:
        """Return the function that submits ``call`` on an array to the lane; ranks compare the calls' signatures."""

        def submit(array: np.ndarray, arrived: Callable[[], None] | None) -> Handle:
            common_shape = array.shape[1:] if operation == "all_gather" else array.shape
            signature = f"{operation} {name} {array.dtype}{list(common_shape)}"
            return self._lane.submit(partial(call, array), signature, now, arrived)

        return submit

    def _all_reduce(self, tensor: Any, name: str, op: str, now: bool) -> Handle:
        summed = mpi_collectives.adasum if op == "adasum" else mpi_collectives.all_reduce
        call = _call(summed, self._in_place)
        return self._start("all_reduce", tensor, name, call, tuple(tensor.shape), now)

    def _sum(self, tensor: Any, name: str) -> Any:
        return self._all_reduce(tensor, name, "sum", True).wait()

    def _sum_together(self, tensors: Sequence[Any], name: str) -> list[Any]:
        collective = self._collective("all_reduce", name, _call(mpi_collectives.all_reduce, self._in_place), True)
        return self.counted("all_reduce", name, tensors, lambda: self._tensors.together(tensors, collective)).wait()

    def _all_gather(self, tensor: Any, name: str, now: bool) -> Handle:
        shape = (None, *tuple(tensor.shape)[1:])
        return self._start("all_gather", tensor, name, mpi_collectives.all_gather, shape, now)

    def _reduce_scatter(self, tensor: Any, name: str, now: bool) -> Handle:
        rows, size = tensor.shape[0], len(self.ranks)
        even = rows is not None and rows % size == 0
        shape = (rows // size if even else None, *tuple(tensor.shape)[1:])
        return self._start("reduce_scatter", tensor, name, mpi_collectives.reduce_scatter, shape, now)

    def _broadcast(self, tensor: Any, root: int, name: str, now: bool) -> Handle:
        def post(array: np.ndarray, arrived: Callable[[], None] | None) -> Handle:
            if arrived is not None:
                arrived()
            return self._messages.broadcast(array, root, name, f"broadcast {name} {array.dtype}{list(array.shape)}")

        call = _call(mpi_collectives.broadcast, root)
        collective = self._collective("broadcast", name, call, now) if now else post
        shape = tuple(tensor.shape)
        return self.counted("broadcast", name, [tensor], lambda: self._tensors.through(tensor, collective, shape))

    def _all_to_all(self, tensor: Any, name: str, now: bool) -> Handle:
        return self._start("all_to_all", tensor, name, mpi_collectives.all_to_all, tuple(tensor.shape), now)

    def all_reduce_async(self, tensor: Any, name: str, op: str = "sum") -> Handle:
        """Start a sum."""
        return self._all_reduce(tensor, name, op, False)

    def all_gather_async(self, tensor: Any, name: str) -> Handle:
        """Start a concatenation."""
        return self._all_gather(tensor, name, False)

    def reduce_scatter_async(self, tensor: Any, name: str) -> Handle:
        """Start a reduce-scatter."""
        return self._reduce_scatter(tensor, name, False)

    def broadcast_async(self, tensor: Any, root: int, name: str) -> Handle:
        """Start a broadcast."""
        return self._broadcast(tensor, root, name, False)

    def all_to_all_async(self, tensor: Any, name: str) -> Handle:
        """Start an all-to-all."""
        return self._all_to_all(tensor, name, False)

    def all_gather(self, tensor: Any, name: str) -> Any:
        """Return the concatenation."""
        return self._all_gather(tensor, name, True).wait()

    def reduce_scatter(self, tensor: Any, name: str) -> Any:
        """Return this member's shard of the sum."""
        return self._reduce_scatter(tensor, name, True).wait()

    def broadcast(self, tensor: Any, root: int, name: str) -> Any:
        """Return the root's tensor."""
        return self._broadcast(tensor, root, name, True).wait()

    def all_to_all(self, tensor: Any, name: str) -> Any:
        """Return the exchanged shards."""
        return self._all_to_all(tensor, name, True).wait()

    def barrier(self) -> None:
        """Wait for all members."""
        submit = partial(self._lane.submit, mpi_collectives.barrier, "barrier", True)
        self.counted("barrier", "barrier", [], submit).wait()


def _call(function: Callable[..., np.ndarray], setting: Any) -> Callable[..., np.ndarray]:
    """Return ``function`` with its second argument, ``setting``, filled in."""
    return lambda array, communicator: function(array, setting, communicator)
