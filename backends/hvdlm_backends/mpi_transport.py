"""The collectives of a group over MPI: in the thread of a lane, or as messages that are matched by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from hvdlm.protocols.group import Handle
from hvdlm_backends import mpi_collectives
from hvdlm_backends.host_transport import Collective
from hvdlm_backends.lanes import Lane
from hvdlm_backends.named_messages import NamedMessages


class MPITransport:
    """Implements ``HostTransport``.

    Args:
        communicator: of the group's members, used by this transport alone.
        ranks: the group's ranks.
        name: distinguishes the group's threads.
        ring_bytes: sums of at least so many bytes go around a ring of ranks (``ring_sum``); 0: none.
    """

    def __init__(self, communicator: Any, ranks: tuple[int, ...], name: str, ring_bytes: int = 0) -> None:
        self.ranks = ranks
        self._ring_bytes = ring_bytes
        self._lane = Lane(communicator, ranks)
        self._messages = NamedMessages(communicator, name)

    def start(self, collective: Collective, array: np.ndarray, arrived: Callable[[], None] | None) -> Handle:
        """Start a collective; see ``HostTransport``."""
        signature = collective.signature(array)
        if collective.operation == "broadcast" and not collective.now:
            if arrived is not None:
                arrived()
            return self._messages.broadcast(array, collective.root, collective.name, signature)
        call = partial(_CALLS[collective.operation], collective, array)
        if collective.operation == "all_reduce" and 0 < self._ring_bytes <= array.nbytes and collective.op == "sum":
            call = partial(mpi_collectives.all_reduce, array, collective.in_place, ring=True)
        return self._lane.submit(call, signature, collective.now, arrived)

    @property
    def seconds(self) -> float:
        """Time spent in collectives, without waiting for other ranks to be ready."""
        return self._lane.seconds + self._messages.seconds

    def close(self) -> None:
        """Wait for the collectives in flight, and end the threads."""
        self._lane.close()
        self._messages.close()


def _all_reduce(collective: Collective, array: np.ndarray, communicator: Any) -> np.ndarray:
    summed = mpi_collectives.adasum if collective.op == "adasum" else mpi_collectives.all_reduce
    return summed(array, collective.in_place, communicator)


_CALLS: dict[str, Callable[[Collective, np.ndarray, Any], Any]] = {
    "all_reduce": _all_reduce,
    "all_gather": lambda _, array, communicator: mpi_collectives.all_gather(array, communicator),
    "reduce_scatter": lambda _, array, communicator: mpi_collectives.reduce_scatter(array, communicator),
    "broadcast": lambda call, array, communicator: mpi_collectives.broadcast(array, call.root, communicator),
    "all_to_all": lambda _, array, communicator: mpi_collectives.all_to_all(array, communicator),
    "barrier": lambda _, array, communicator: mpi_collectives.barrier(communicator),
}
