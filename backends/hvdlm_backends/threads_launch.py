"""Starts ranks as threads of this process, and ends all of them when one fails."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from typing import Any

from hvdlm.errors import HvdlmError, RankError
from hvdlm.io import rank_context
from hvdlm_backends.threads_network import Injection, Network, RanksEnded

_END_SECONDS = 5.0  # in which the other ranks have to end when one has failed
_numbers = itertools.count(1)


class RanksStopped(RankError):
    """Raised where a rank has ended all, and has reported why; ``code``: the exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the ranks of this process have ended with exit code {code}: standard error says why.")
        self.code = code


class Launch(rank_context.ThreadLaunch):
    """Ranks that are threads; ``network``: what they communicate through."""

    def __init__(self, size: int, injection: Injection | None = None) -> None:
        super().__init__(size, f"threads of process {os.getpid()} on {socket.gethostname()}, launch {next(_numbers)}")
        self.network = Network(size, injection)
        self._code: int | None = None
        self._results: list[Any] = [None] * size
        self._errors: list[tuple[int, BaseException]] = []  # the first that was raised is the first
        self._events: queue.SimpleQueue[int | Callable[[], Any] | None] = queue.SimpleQueue()
        self._starter = threading.current_thread()

    def end(self, code: int) -> Any:
        """End all ranks with this exit code; does not return."""
        if self._code is None:
            self._code = code
        self.network.end()
        self._events.put(None)
        if threading.current_thread() is rank_context.main_thread():
            raise RanksEnded(code)
        raise SystemExit(code)  # of a thread, such as a watchdog's: Python prints errors of any other class

    def in_main_thread(self, function: Callable[[], Any]) -> bool:
        """Call ``function`` in the main thread; return False where it did not start the ranks."""
        if self._starter is not threading.main_thread():
            return False
        called = threading.Event()

        def call() -> None:
            function()
            called.set()

        self._events.put(call)
        return called.wait(_END_SECONDS)

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """Return what ``function(rank)`` returns on every rank.

        Raises:
            BaseException: that of the rank which failed first.
            RanksStopped: a rank has ended all.
        """
        _inherit_ranks()
        threads = [
            threading.Thread(target=self._run_rank, args=(rank, function), name=f"hvdlm-rank-{rank}", daemon=True)
            for rank in range(self.size)
        ]
        for thread in threads:
            thread.start()
        try:
            self._wait()
        finally:
            self.network.end()
        if self._errors:
            raise self._first_error()
        if self._code is not None:
            raise RanksStopped(self._code)
        return self._results

    def _run_rank(self, rank: int, function: Callable[[int], Any]) -> None:
        rank_context.enter(rank_context.ThreadRank(rank, self))
        try:
            self._results[rank] = function(rank)
        except RanksEnded:
            pass
        except BaseException as error:  # raised again in the thread that started the ranks
            self._errors.append((rank, error))
            self.network.end()
        finally:
            self._events.put(rank)

    def _wait(self) -> None:
        """Wait until all ranks have ended; after a failure, for a moment."""
        running, deadline = set(range(self.size)), float("inf")
        while running:
            with contextlib.suppress(queue.Empty):
                seconds = None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
                event = self._events.get(timeout=seconds)
                if callable(event):
                    event()
                else:
                    running -= {event}
            if self._errors or self._code is not None:
                deadline = min(deadline, time.monotonic() + _END_SECONDS)
                if time.monotonic() >= deadline:
                    return

    def _first_error(self) -> BaseException:
        """Return the error that was raised first, that of the lowest of the ranks that raised the same."""
        first = self._errors[0][1]
        same = [(rank, error) for rank, error in self._errors if str(error) == str(first)]
        rank, error = min(same, key=lambda pair: pair[0])
        if rank and isinstance(error, HvdlmError):
            error.args = (f"rank {rank}: {error}",)
        return error


def run_command(size: int, command: Callable[[], int]) -> int:
    """Run ``command`` on ``size`` ranks; return the exit code: of several, the highest.

    Raises:
        HvdlmError: a rank refuses its input.
    """
    launch = Launch(size)
    try:
        return max(launch.run(lambda _: command()))
    except RanksStopped as stopped:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(stopped.code)  # ranks that hang in native code would hold up an orderly exit


@functools.cache
def _inherit_ranks() -> None:
    """Have every thread that a rank's thread starts, directly or through a library, belong to the rank."""
    start = threading.Thread.start

    def start_in_context(thread: threading.Thread) -> None:
        own = rank_context.current()
        if own is not None:
            own.threads.add(thread)
            thread.run = functools.partial(copy_context().run, thread.run)  # type: ignore[method-assign]
        start(thread)

    threading.Thread.start = start_in_context  # type: ignore[method-assign,assignment]
