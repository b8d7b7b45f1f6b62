"""Background broadcasts that ranks may start in any order: point-to-point messages from the root, matched by name.

Pipeline stages start to receive their inputs before they send their outputs, so that two stages start the same
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


class _Broadcast:
    """One broadcast in flight: its MPI requests, and the array that they fill or send."""

    def __init__(self, job: Job, requests: list[Any], array: np.ndarray, expected: int | None) -> None:
        self.job = job
        self._requests = requests
        self._array = array
        self._expected = expected  # bytes to receive; None on the root
        self._mpi = sys.modules["mpi4py.MPI"]

    def poll(self) -> bool:
        """Return whether the broadcast is complete; finish its job if so."""
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
                raise RankError(f"{self.job.signature}: expected {self._expected} bytes, received {count}.")
            self.job.finish(self._array)
        except Exception as error:  # raised again in the thread that waits
            self.job.finish(None, error)
        return True


class NamedMessages:
    """The broadcasts of one communicator.

    Attributes:
        seconds: time spent in MPI.
    """

    def __init__(self, communicator: Any, name: str) -> None:
        self.seconds = 0.0
        self._communicator = communicator
        self._name = name
        self._in_flight: list[_Broadcast] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def broadcast(self, array: np.ndarray, root: int, name: str, signature: str) -> Job:
        """Start to send ``array`` from member ``root`` to all others; the result is a new array."""
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
            self._in_flight.append(_Broadcast(job, requests, received, None if rank == root else received.nbytes))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=f"{self._name}-messages", daemon=True)
                self._thread.start()
            self._changed.notify()
        return job

    def close(self) -> None:
        """Wait for all broadcasts in flight."""
        for broadcast in list(self._in_flight):
            broadcast.job.wait()

    def _work(self) -> None:
        """Poll the broadcasts in flight: MPI makes progress on them only inside of its calls."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._in_flight))
                pending = list(self._in_flight)
            pause = Pause()
            while pending:
                began = time.perf_counter()
                complete = [broadcast for broadcast in pending if broadcast.poll()]
                with self._changed:
                    self.seconds += time.perf_counter() - began
                    self._in_flight = [broadcast for broadcast in self._in_flight if broadcast not in complete]
                    if complete or len(self._in_flight) > len(pending):
                        pause = Pause()
                    pending = list(self._in_flight)
                pause.sleep(any(broadcast.job.awaited for broadcast in pending))
