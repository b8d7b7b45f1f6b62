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
        """Return what ``function()`` returns in each of ``ranks`` threads; see ``run_command``.

        Raises:
            BaseException: that of the rank which failed first; the others are ended.
        """

    def run_command(self, ranks: str, command: Callable[[], int]) -> int:
        """Run ``command`` on as many ranks as ``--ranks`` says; return the exit code of the whole.

        Raises:
            HvdlmError: there can't be as many, a launcher started this process, or a rank refuses its input.
        """
