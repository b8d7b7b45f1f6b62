"""Backends: how ranks find each other, and the library that moves the bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from hvdlm.protocols.framework import Framework
from hvdlm.protocols.world import World

if TYPE_CHECKING:
    from hvdlm.config import Config


class Backend(Protocol):
    """Connects the ranks, and provides the collectives between them."""

    name: str

    def launch_shape(self) -> tuple[int, int, int, int]:
        """Return (rank, size, local rank, local size) from the launcher's environment, without importing anything.

        Raises:
            HvdlmError: the launcher started ranks that this backend can't reach.
        """

    def prepare(self, config: Config) -> int:
        """Set environment variables that must be set before a framework is imported; return the threads per rank."""

    def start(self, framework: Framework, groups: Sequence[tuple[int, ...]], config: Config) -> World:
        """Connect to the other ranks. ``groups``: every set of ranks that will be used, the same list on all ranks.

        Raises:
            HvdlmError: the transport is not built, or fewer ranks respond than the launcher started.
        """


@runtime_checkable
class StartsRanks(Backend, Protocol):
    """A backend whose ranks no launcher starts: they are threads of the process (``threads``)."""

    def run_ranks(self, ranks: int, function: Callable[[], Any]) -> list[Any]:
        """Return what ``function()`` returns on each rank; raise the error of the first that fails."""
