"""Group over host memory: tensors become arrays, which a transport passes between ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from hvdlm.diagnostics.flight_recorder import FlightRecorder
from hvdlm.protocols.framework import HostTensors
from hvdlm.protocols.group import Handle
from hvdlm_backends.groups import CountedGroup
from hvdlm_backends.host_transport import Collective, HostTransport

Shape = tuple[int | None, ...]
_NOTHING = np.empty(0, np.uint8)  # what a barrier sends


class HostGroup(CountedGroup):
    """The collectives of one group.

    ``in_place``: whether a sum may overwrite its input (``Framework.in_place``).
    """

    def __init__(
        self, transport: HostTransport, tensors: HostTensors, in_place: bool, recorder: FlightRecorder | None = None
    ) -> None:
        super().__init__(transport.ranks, recorder)
        self._transport = transport
        self._tensors = tensors
        self._in_place = in_place

    def _start(self, collective: Collective, tensor: Any, shape: Shape) -> Handle:
        """Start a collective; ``shape``: of the result, with None where ranks may differ."""
        start = partial(self._transport.start, collective)
        through = partial(self._tensors.through, tensor, start, shape)
        return self.counted(collective.operation, collective.name, [tensor], through)

    def _all_reduce(self, tensor: Any, name: str, op: str, now: bool) -> Handle:
        collective = Collective("all_reduce", name, op, self._in_place, now=now)
        return self._start(collective, tensor, tuple(tensor.shape))

    def _sum(self, tensor: Any, name: str) -> Any:
        return self._all_reduce(tensor, name, "sum", True).wait()

    def _sum_together(self, tensors: Sequence[Any], name: str) -> list[Any]:
        start = partial(self._transport.start, Collective("all_reduce", name, "sum", self._in_place, now=True))
        return self.counted("all_reduce", name, tensors, partial(self._tensors.together, tensors, start)).wait()

    def _all_gather(self, tensor: Any, name: str, now: bool) -> Handle:
        return self._start(Collective("all_gather", name, now=now), tensor, (None, *tuple(tensor.shape)[1:]))

    def _reduce_scatter(self, tensor: Any, name: str, now: bool) -> Handle:
        rows, size = tensor.shape[0], len(self.ranks)
        even = rows is not None and rows % size == 0
        shape = (rows // size if even else None, *tuple(tensor.shape)[1:])
        return self._start(Collective("reduce_scatter", name, now=now), tensor, shape)

    def _broadcast(self, tensor: Any, root: int, name: str, now: bool) -> Handle:
        return self._start(Collective("broadcast", name, root=root, now=now), tensor, tuple(tensor.shape))

    def _all_to_all(self, tensor: Any, name: str, now: bool) -> Handle:
        return self._start(Collective("all_to_all", name, now=now), tensor, tuple(tensor.shape))

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
        start = partial(self._transport.start, Collective("barrier", "barrier", now=True), _NOTHING, None)
        self.counted("barrier", "barrier", [], start).wait()
