"""Broadcasts in the background that ranks may start in any order: messages from the root, matched by name.

Stages of a pipeline ask for what they need before they send what they have made, so that two stages start the same
broadcasts in different orders.
"""

from __future__ import annotations

import sys
import threading
import time
import zlib
from typing import Any

import numpy as np

from hvdlm.errors import RankError
from hvdlm_backends.lanes import Job, Pause
from hvdlm_backends.mpi_collectives import as_integers, empty


class _Flight:
    """One broadcast under way: its messages' requests, and the array that they fill or that they were sent from."""

    def __init__(self, job: Job, requests: list[Any], array: np.ndarray, expected: int | None) -> None:
        self.job, self._requests, self._array, self._expected = job, requests, array, expected
        self._mpi = sys.modules["mpi4py.MPI"]

    def landed(self) -> bool:
        """Finish the job where all messages have arrived; return whether they have."""
        try:
            status = self._mpi.Status()
            done = (
                self._requests[0].Test(status)
                if self._expected is not None
                else self._mpi.Request.Testall(self._requests)
            )
            if not done:
                return False
            if self._expected not in (None, count := status.Get_count(self._mpi.BYTE)):
                raise RankError(f"{self.job.signature}: {self._expected} bytes were expected, {count} came.")
            self.job.finish(self._array)
        except Exception as error:  # whoever waits is to see it
            self.job.finish(None, error)
        return True


class NamedMessages:
    """The broadcasts of one communicator.

    Attributes:
        seconds: time spent in MPI.
    """

    def __init__(self, communicator: Any, name: str) -> None:
        self.seconds = 0.0
        self._communicator, self._name = communicator, name
        self._flights: list[_Flight] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def broadcast(self, array: np.ndarray, root: int, name: str, signature: str) -> Job:
        """Start to send ``array`` from member ``root`` to all others; the result is an array of its own."""
        mpi, rank = sys.modules["mpi4py.MPI"], self._communicator.Get_rank()
        tag = 1 + zlib.crc32(name.encode()) % self._communicator.Get_attr(mpi.TAG_UB)
        job, received = Job(None, signature, False, None), empty(array.shape, array.dtype)
        began = time.perf_counter()
        if rank == root:
            received[...] = array
            others = [other for other in range(self._communicator.Get_size()) if other != root]
            requests = [self._communicator.Isend(as_integers(received), other, tag) for other in others]
        else:
            requests = [self._communicator.Irecv(as_integers(received), root, tag)]
        with self._changed:
            self.seconds += time.perf_counter() - began
            self._flights.append(_Flight(job, requests, received, None if rank == root else received.nbytes))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=f"{self._name}-messages", daemon=True)
                self._thread.start()
            self._changed.notify()
        return job

    def close(self) -> None:
        """Wait for what is under way."""
        for flight in list(self._flights):
            flight.job.wait()

    def _work(self) -> None:
        """Have MPI move what is under way: it does so only inside of its calls."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._flights))
                flights = list(self._flights)
            pause = Pause()
            while flights:
                began = time.perf_counter()
                landed = [flight for flight in flights if flight.landed()]
                with self._changed:
                    self.seconds += time.perf_counter() - began
                    self._flights = [flight for flight in self._flights if flight not in landed]
                    if landed or len(self._flights) > len(flights):
                        pause = Pause()
                    flights = list(self._flights)
                pause.sleep(any(flight.job.awaited for flight in flights))
