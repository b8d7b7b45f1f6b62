"""All ranks of one run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from hvdlm.protocols.group import Group, Handle

if TYPE_CHECKING:
    from hvdlm.diagnostics.flight_recorder import FlightRecorder


class HostMessages(Protocol):
    """Host-side messages (JSON, bytes, counts) between ranks. All ranks call the same methods in the same order."""

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        """Return rank ``root``'s JSON-like ``value`` on all ranks. All ranks call."""

    def gather_objects(self, value: Any) -> list[Any]:
        """Return every rank's JSON-like ``value``, in rank order, on all ranks. All ranks call."""

    def any(self, flag: bool) -> bool:
        """Return whether any rank's flag is set. All ranks call."""

    def agree(self, counts: Sequence[int]) -> Handle:
        """Start the sum over ranks of ``counts`` (small whole numbers), equally many on all ranks.

        It travels in the background: waited for one step later, it costs next to nothing. ``wait`` returns
        ``list[int]``. All ranks call, and only one may be in progress.
        """

    def broadcast_bytes(self, data: bytes | None, root: int) -> bytes:
        """Return rank ``root``'s ``data`` (below 2 GB) on all ranks. All ranks call; the others' is ignored."""


class World(HostMessages, Protocol):
    """The ranks of one run. Started by a Backend, closed by the loop.

    Attributes:
        transport: the library that moves the bytes.
        recorder: the flight recorder of this rank's collectives, for the diagnosis of a hang.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    transport: str
    recorder: FlightRecorder

    def group(self, ranks: Sequence[int]) -> Group:
        """Return the group of these ranks, made at the start from the mesh; HvdlmError for any other."""

    def transfer_seconds(self) -> float | None:
        """Return the seconds that this rank's collectives took so far, in the background or not; None: unknown."""

    def abort(self, code: int) -> None:
        """End all ranks at once with this exit code; does not return."""

    def close(self) -> None:
        """Shut the transport down cleanly. All ranks call."""
