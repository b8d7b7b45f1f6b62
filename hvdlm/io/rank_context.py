"""The rank that code belongs to, where ranks are threads of one process (backend ``threads``).

Elsewhere a process is one rank, and ``current`` returns None. The threads that a rank starts belong to it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from contextvars import ContextVar
from typing import Any, TypeVar, cast
from weakref import WeakSet

T = TypeVar("T")


class ThreadLaunch:
    """Ranks that were started together, as threads.

    Attributes:
        size: the number of ranks.
        identity: distinguishes them from other launches.
        values: what one of them has made for all (``once``).
    """

    def __init__(self, size: int, identity: str) -> None:
        self.size = size
        self.identity = identity
        self.values: dict[Hashable, Any] = {}
        self.lock = threading.Lock()

    def end(self, code: int) -> Any:
        """End all ranks with this exit code; does not return."""

    def in_main_thread(self, function: Callable[[], Any]) -> bool:
        """Call ``function`` in the main thread; return False where it did not start the ranks."""
        return False


class ThreadRank:
    """One of the ranks of ``launch``; ``threads``: those that it has started, and ``main``, which runs its command."""

    def __init__(self, rank: int, launch: ThreadLaunch) -> None:
        self.rank = rank
        self.launch = launch
        self.main = threading.current_thread()
        self.threads = WeakSet({self.main})
        self.values: dict[int, Any] = {}


_current: ContextVar[ThreadRank | None] = ContextVar("hvdlm_rank", default=None)
enter = _current.set
"""Make the calling thread's context that of a ThreadRank."""
current = _current.get
"""Return the rank that the calling thread belongs to; None where the process is one."""


def main_thread() -> threading.Thread:
    """Return the thread that runs this rank's command."""
    own = current()
    return own.main if own else threading.main_thread()


def threads() -> list[threading.Thread]:
    """Return the living threads of this rank."""
    own = current()
    return [thread for thread in threading.enumerate() if own is None or thread in own.threads]


def in_main_thread(function: Callable[[], Any]) -> bool:
    """Call ``function`` in the process's main thread, which alone may handle signals; of several ranks, rank 0 may.

    Return whether it was called.
    """
    own = current()
    if threading.current_thread() is threading.main_thread():
        function()
        return True
    return own is not None and own.rank == 0 and own.launch.in_main_thread(function)


def once(key: Hashable, make: Callable[[], T]) -> T:
    """Return ``make()``, which the first of a launch's threads calls for all: the result is not to be changed."""
    own = current()
    if own is None:
        return make()
    with own.launch.lock:
        if key not in own.launch.values:
            own.launch.values[key] = make()
        return cast(T, own.launch.values[key])


class _PerRank:
    """Stands for one object in each rank: that of the rank whose thread asks."""

    def __init__(self, make: Callable[[], Any]) -> None:
        vars(self).update(_make=make, _of_process=make())

    def _own(self) -> Any:
        own = current()
        if own is None:
            return self._of_process
        if id(self) not in own.values:
            own.values[id(self)] = self._make()
        return own.values[id(self)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._own(), name, value)


def per_rank(make: Callable[[], T]) -> T:
    """Return an object that stands for ``make()`` of every rank: what would be one of a process is one of a rank."""
    return cast(T, _PerRank(make))
