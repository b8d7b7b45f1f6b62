"""What a group over host memory needs of a transport: collectives on arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from hvdlm.protocols.group import Handle


class Collective(NamedTuple):
    """A collective as a member starts it.

    Attributes:
        operation: the name of ``Group``'s method, without ``_async``.
        name: the name that the caller gave.
        op: sum or adasum, of an all-reduce.
        in_place: whether the sum may overwrite the array.
        root: index of the member that a broadcast sends from.
        now: whether the caller waits for the result at once, on all members.
    """

    operation: str
    name: str
    op: str = "sum"
    in_place: bool = False
    root: int = 0
    now: bool = False

    def signature(self, array: np.ndarray) -> str:
        """Return what has to be equal on all members: operation, name, dtype and shape."""
        if self.operation == "barrier":
            return "barrier"
        shape = array.shape[1:] if self.operation == "all_gather" else array.shape
        return f"{self.operation} {self.name} {array.dtype}{list(shape)}"


class HostTransport(Protocol):
    """The collectives of one group, ``ranks``, on contiguous arrays in host memory."""

    ranks: tuple[int, ...]

    def start(self, collective: Collective, array: np.ndarray, arrived: Callable[[], None] | None) -> Handle:
        """Start a collective; ``wait`` returns an array, which no other rank uses.

        All members start the same collectives in the same order, but for broadcasts that aren't waited for at once:
        these are matched by name. ``arrived`` blocks until ``array`` has been copied from a device.
        """
