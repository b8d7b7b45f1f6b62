"""A communicator's collectives, done in order by a thread of its own while the caller computes.

MPI progresses a collective only inside of MPI's calls: one that was only started would travel while it is waited for.
Here a thread calls MPI for it. Before an asynchronous collective, the ranks agree by a non-blocking sum of 16 bytes
that all of them are ready: while one still computes, the threads of the others sleep instead of spinning in MPI, which
would take the core that their own computation needs.
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

_SHORTEST, _LONGEST, _GROWTH = 2e-5, 1e-3, 1.3  # seconds between looks whether all ranks are ready


class Pause:
    """The pauses of a thread that looks again and again whether something has come: the longer, the longer it waits."""

    def __init__(self) -> None:
        self._seconds = _SHORTEST

    def sleep(self, awaited: bool) -> None:
        """Sleep; ``awaited``: its rank has nothing to compute, so that this thread may look whenever it gets a turn."""
        time.sleep(0.0 if awaited else self._seconds)
        self._seconds = min(_GROWTH * self._seconds, _LONGEST)


class Job:
    """One collective, handed over: ``wait`` returns its array."""

    def __init__(
        self, call: Callable[[Any], Any] | None, signature: str, now: bool, arrived: Callable[[], None] | None
    ) -> None:
        self.call, self.signature, self.now, self.arrived = call, signature, now, arrived
        self.awaited = False
        self._done = threading.Event()
        self._result: Any = None
        self._error: BaseException | None = None

    def finish(self, result: Any, error: BaseException | None = None) -> None:
        """Hand the result, or what went wrong, to whoever waits."""
        self.call, self.arrived = None, None  # what they hold may be large
        self._result, self._error = result, error
        self._done.set()

    def wait(self) -> Any:
        """Return the result; raise what the collective raised."""
        self.awaited = True
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._result


class Lane:
    """The collectives of one communicator, which belongs to the lane alone.

    All members hand over the same collectives in the same order: it is checked before each, by name, dtype and shape.

    Attributes:
        seconds: time spent in collectives, waiting for other ranks to be ready not included.
    """

    def __init__(self, communicator: Any, ranks: tuple[int, ...]) -> None:
        self.seconds = 0.0
        self._communicator, self.ranks = communicator, ranks
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._guard, self._running = threading.Lock(), threading.Lock()
        self._unfinished = 0
        self._thread: threading.Thread | None = None

    def submit(
        self, call: Callable[[Any], Any], signature: str, now: bool = False, arrived: Callable[[], None] | None = None
    ) -> Job:
        """Hand over ``call(communicator)``; ``now``: the caller waits for it at once (on all ranks).

        The caller's own thread does what is waited for at once, unless something is under way before it. ``arrived``
        returns when what is to be sent has come from a device.
        """
        job = Job(call, signature, now, arrived)
        with self._guard:
            alone = now and self._unfinished == 0
            self._unfinished += 1
            if alone:
                self._running.acquire()
            elif self._thread is None:
                name = f"hvdlm-lane-{'-'.join(map(str, self.ranks[:4]))}"
                self._thread = threading.Thread(target=self._work, name=name, daemon=True)
                self._thread.start()
        if not alone:
            self._jobs.put(job)
            return job
        try:
            self._do(job)
        finally:
            self._running.release()
        return job

    def close(self) -> None:
        """Finish what has been handed over, and end the thread."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            with self._running:
                self._do(job)

    def _do(self, job: Job) -> None:
        result, error = None, None
        try:
            if job.arrived is not None:
                job.arrived()
            self._agree(job)
            began = time.perf_counter()
            assert job.call is not None
            result = job.call(self._communicator)
            self.seconds += time.perf_counter() - began
        except BaseException as raised:  # whoever waits is to see it
            error = raised
        with self._guard:
            self._unfinished -= 1
        job.finish(result, error)

    def _agree(self, job: Job) -> None:
        """Return when all members have come to this collective.

        Raises:
            RankError: they have come to different ones.
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
            each = "; ".join(f"rank {rank}: {call}" for rank, call in zip(self.ranks, calls, strict=True))
            raise RankError(f"ranks have come to different collectives: {each}.")
