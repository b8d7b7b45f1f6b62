"""Base class of worlds of several ranks: host-side messages (JSON), recorded in the flight recorder."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hvdlm.diagnostics.flight_recorder import FlightRecorder
from hvdlm.errors import HvdlmError
from hvdlm.protocols.group import Group, Handle
from hvdlm_backends.local import AloneGroup
from hvdlm_backends.messages import FunctionHandle, Messages


class RanksWorld:
    """Base class of worlds: the messages of a ``World``, from those of bytes; ``group`` and ``abort``.

    A backend adds ``local_rank``, ``local_size``, ``transport``, ``transfer_seconds`` and ``close``.

    Attributes:
        groups: its groups of two ranks or more by their ranks, that of all ranks among them; the backend fills it.
        recorder: the flight recorder, for the groups.

    Args:
        rank: this rank.
        size: the number of ranks.
        messages: host-side messages of bytes between all ranks.
        communicator: that of mpi4py, None without MPI.
        recorder: None: a new one.
    """

    def __init__(
        self, rank: int, size: int, messages: Messages, communicator: Any, recorder: FlightRecorder | None = None
    ) -> None:
        self.rank = rank
        self.size = size
        self._messages = messages
        self._communicator = communicator
        self.recorder = recorder or FlightRecorder(rank, size)
        self.groups: dict[tuple[int, ...], Group] = {}
        self._everyone = self.recorder.recorded_group(tuple(range(size)))

    def group(self, ranks: Sequence[int]) -> Group:
        """Return the group of these ranks."""
        key = tuple(ranks)
        if len(key) == 1:
            return AloneGroup(key[0])
        if key not in self.groups:
            raise HvdlmError(f"ranks {key} are not a group of this run's mesh, whose groups are declared at the start.")
        return self.groups[key]

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        """Return the root's value on all ranks."""
        if self.size == 1:
            return value
        data = json.dumps(value).encode() if self.rank == root else None
        return json.loads(self._recorded("broadcast_object", lambda: self._messages.broadcast(data, root)))

    def gather_objects(self, value: Any) -> list[Any]:
        """Return every rank's value on all ranks."""
        data = json.dumps(value).encode()
        return [json.loads(text) for text in self._recorded("gather_objects", lambda: self._messages.gather(data))]

    def broadcast_bytes(self, data: bytes | None, root: int) -> bytes:
        """Return the root's bytes on all ranks."""
        return self._recorded("broadcast_bytes", lambda: self._messages.broadcast(data, root))

    def agree(self, counts: Sequence[int]) -> Handle:
        """Start to sum the counts of all ranks."""
        handle = self._messages.add(counts)
        # Recorded while it is waited for only: it may be in flight for as long as a step takes, which is no hang.
        return FunctionHandle(lambda: self._recorded("agree", handle.wait))

    def _recorded(self, operation: str, call: Callable[[], Any]) -> Any:
        """Call what all ranks call, and record it in the flight recorder."""
        number = self.recorder.begin(operation, "", self._everyone)
        result = call()
        self.recorder.end(number)
        return result

    def any(self, flag: bool) -> bool:
        """Return whether any rank's flag is set."""
        return any(self.gather_objects(bool(flag)))

    def raw(self, collective: str, array: np.ndarray, in_place: bool = False) -> Callable[[], Any] | None:
        """Return a call of mpi4py's collective on buffers made here; None without MPI."""
        if self._communicator is None:
            return None
        comm, size = self._communicator, self.size
        received = np.zeros(array.size * (size if collective == "all_gather" else 1), array.dtype)
        in_place_marker = sys.modules["mpi4py.MPI"].IN_PLACE
        if collective == "reduce_scatter":
            received = received[: array.size // size].copy()
        return {
            "all_reduce": lambda: comm.Allreduce(in_place_marker if in_place else array, received),
            "all_gather": lambda: comm.Allgather(array, received),
            "reduce_scatter": lambda: comm.Reduce_scatter_block(array, received),
            "broadcast": lambda: comm.Bcast(array, 0),
            "all_to_all": lambda: comm.Alltoall(array, received),
        }[collective]

    def abort(self, code: int) -> None:
        """End all ranks: through MPI where there is MPI; horovodrun ends the others when one exits with an error."""
        sys.stdout.flush()
        sys.stderr.flush()
        if self._communicator is not None:
            self._communicator.Abort(code)
        os._exit(code)
