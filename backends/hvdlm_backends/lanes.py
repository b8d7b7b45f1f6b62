"""Runs a communicator's collectives in order in a thread of its own, while the caller computes.

MPI makes progress on a collective only inside of MPI calls: one that is merely started would be transferred while it is
waited for. Here a thread makes these calls. Before an asynchronous collective, the ranks agree by a non-blocking
reduction of 16 bytes that all of them are ready: while one still computes, the threads of the others sleep instead of
spinning in MPI, which would take the core that their own computation needs.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from hvdlm.errors import RankError

_SHORTEST, _LONGEST = 2e-5, 1e-3  # seconds between two polls whether all ranks are ready
_GROWTH = 1.3  # factor from one interval to the next


class Pause:
    """The intervals of a thread that polls: they grow while it waits."""

    def __init__(self) -> None:
        self._seconds = _SHORTEST

    def sleep(self, awaited: bool) -> None:
        """Sleep until the next poll; only yield if ``awaited``, since the rank then has nothing else to compute."""
        time.sleep(0.0 if awaited else self._seconds)
        self._seconds = min(_GROWTH * self._seconds, _LONGEST)


class Job:
    """One submitted collective; ``wait`` returns its array."""

    def __init__(
        self, call: Callable[[Any], Any] | None, signature: str, now: bool, arrived: Callable[[], None] | None
    ) -> None:
        self.call = call
        self.signature = signature
        self.now = now
        self.arrived = arrived
        self.awaited = False
        self._done = threading.Event()
        self._result: Any = None
        self._error: BaseException | None = None

    def finish(self, result: Any, error: BaseException | None = None) -> None:
        """Set the result or the error, and wake the thread that waits."""
        self.call, self.arrived = None, None  # they may hold references to large tensors
        self._result = result
        self._error = error
        self._done.set()

    def wait(self) -> Any:
        """Return the result, or raise the collective's error."""
        self.awaited = True
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._result


class Lane:
    """The queue of collectives of one communicator, which only this lane uses.

    All members submit the same collectives in the same order: name, dtype and shape are compared before each.

    Attributes:
        seconds: time spent in collectives, without waiting for other ranks to be ready.
    """

    def __init__(self, communicator: Any, ranks: tuple[int, ...]) -> None:
        self.seconds = 0.0
        self._communicator = communicator
        self.ranks = ranks
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._counter_lock = threading.Lock()
        self._running = threading.Lock()
        self._unfinished = 0
        self._thread: threading.Thread | None = None

    def submit(
        self, call: Callable[[Any], Any], signature: str, now: bool = False, arrived: Callable[[], None] | None = None
    ) -> Job:
        """Submit ``call(communicator)``; ``now``: the caller will wait for it at once (on all ranks).

        A collective that is waited for at once runs in the caller's thread, unless another one is still in flight.
        ``arrived`` blocks until the input has been copied from a device.
        """
        job = Job(call, signature, now, arrived)
        with self._counter_lock:
            in_caller = now and self._unfinished == 0
            self._unfinished += 1
            if in_caller:
                self._running.acquire()
            elif self._thread is None:
                name = f"hvdlm-lane-{'-'.join(map(str, self.ranks[:4]))}"
                self._thread = threading.Thread(target=self._work, name=name, daemon=True)
                self._thread.start()
        if not in_caller:
            self._jobs.put(job)
            return job
        try:
            self._run(job)
        finally:
            self._running.release()
        return job

    def close(self) -> None:
        """Finish all submitted collectives, and end the thread."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            with self._running:
                self._run(job)

    def _run(self, job: Job) -> None:
        result, error = None, None
        try:
            if job.arrived is not None:
                job.arrived()
            self._agree(job)
            began = time.perf_counter()
            assert job.call is not None
            result = job.call(self._communicator)
            self.seconds += time.perf_counter() - began
        except BaseException as raised:  # raised again in the thread that waits
            error = raised
        with self._counter_lock:
            self._unfinished -= 1
        job.finish(result, error)

    def _agree(self, job: Job) -> None:
        """Wait until all members have reached this collective.

        Raises:
            RankError: they have reached different ones.
        """
        mpi = sys.modules["mpi4py.MPI"]
        number = zlib.crc32(job.signature.encode())
        sent, largest = np.array([number, -number], np.int64), np.empty(2, np.int64)
        if job.now:
            self._communicator.Allreduce(sent, largest, mpi.MAX)
        else:
            request, pause = self._communicator.Iallreduce(sent, largest, mpi.MAX), Pause()
            while not request.Test():
                pause.sleep(job.awaited)
        if largest[0] != -largest[1]:
            calls = self._communicator.allgather(job.signature)
            by_rank = "; ".join(f"rank {rank}: {call}" for rank, call in zip(self.ranks, calls, strict=True))
            raise RankError(f"ranks have come to different collectives: {by_rank}.")
