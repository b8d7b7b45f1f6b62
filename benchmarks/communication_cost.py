"""What communication costs: 2 ranks against 2 processes that don't talk, and 1 rank against a plain framework loop.

python benchmarks/communication_cost.py [torch tensorflow]

The first ratio is tokens per second of 2 ranks with one thread each, to the sum of those of 2 independent one-rank
runs at the same time: the machine's own ceiling. The 2 ranks and the 2 independent processes stay alive side by side
and take turns by SIGSTOP and SIGCONT, so that neither's threads disturb the other. The second ratio is the speed of
1 rank with two threads to that of a hand-written loop without Horovod.
"""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pairing import FRAMEWORKS, ROWS, Rounds, command, environment, report, turns

BAR_RANKS, BAR_ALONE = 0.95, 1.0
WINDOW, SETTLE, ROUNDS = 3.0, 0.5, 20  # seconds measured, seconds let go before, turns of each


class Job:
    """One or more processes that train without end, and their counters."""

    def __init__(self, framework: str, ranks: int, folder: Path) -> None:
        folder.mkdir()
        self._rows, self._counters = ROWS * ranks, [folder / f"count-{rank}" for rank in range(ranks)]
        options = ("--framework", framework, "--folder", str(folder), "--rows", str(self._rows))
        self._log = (folder / "log").open("w")
        worker = command("steady_worker.py", ranks, *options)
        self._process = subprocess.Popen(worker, env=environment(), stdout=self._log, stderr=self._log)

    def _read(self, counter: Path) -> tuple[int, int]:
        return struct.unpack("<qq", counter.read_bytes()) if counter.exists() else (0, 0)

    def rows(self) -> int:
        """Return sequences done so far, over all ranks."""
        return self._read(self._counters[0])[1] * self._rows

    def warm(self) -> None:
        """Wait until the first steps are done."""
        while self._read(self._counters[0])[1] < 20:
            if self._process.poll() is not None:
                sys.exit(f"a worker failed:\n{Path(self._log.name).read_text()[-3000:]}")
            time.sleep(0.2)

    def send(self, number: int) -> None:
        """Send a signal to every rank."""
        for counter in self._counters:
            self.send_to(counter, number)

    def send_to(self, counter: Path, number: int) -> None:
        """Send a signal to the rank that keeps ``counter``, where it has begun to count."""
        if (process := self._read(counter)[0]) > 0:
            os.kill(process, number)

    def end(self) -> None:
        """End it, stopped or not."""
        for counter in self._counters:
            with contextlib.suppress(ProcessLookupError):
                self.send_to(counter, signal.SIGKILL)
        self._process.kill()
        self._process.wait(30)


def speed(jobs: list[Job]) -> float:
    """Let ``jobs`` run together for a window; return sequences per second of all of them."""
    for job in jobs:
        job.send(signal.SIGCONT)
    time.sleep(SETTLE)
    before, began = sum(job.rows() for job in jobs), time.perf_counter()
    time.sleep(WINDOW)
    after, ended = sum(job.rows() for job in jobs), time.perf_counter()
    for job in jobs:
        job.send(signal.SIGSTOP)
    return (after - before) / (ended - began)


def scaling(framework: str) -> Rounds:
    """Return (speed of 2 ranks, speed of 2 independent processes) of every round."""
    with tempfile.TemporaryDirectory() as folder:
        jobs: list[Job] = []
        try:
            for name, ranks in (("together", 2), ("alone-a", 1), ("alone-b", 1)):
                jobs.append(Job(framework, ranks, Path(folder) / name))
                jobs[-1].warm()
                jobs[-1].send(signal.SIGSTOP)
            rounds = []
            for number in range(ROUNDS):
                first, second = (jobs[:1], jobs[1:]) if number % 2 else (jobs[1:], jobs[:1])
                pair = speed(first), speed(second)
                rounds.append(pair if number % 2 else pair[::-1])
            return rounds
        finally:
            for job in jobs:
                job.end()


def main() -> int:
    """Measure both frameworks; return 1 where one is below its bar."""
    good = True
    for framework in sys.argv[1:] or FRAMEWORKS:
        ratio = report(f"2 ranks against 2 independent processes, {framework}, sequences/s", scaling(framework))
        good &= ratio >= BAR_RANKS
        inverse = [(theirs, ours) for ours, theirs in turns(framework, ranks=1, threads=2)]
        ratio = report(f"1 rank, 2 threads, against a plain loop, {framework}, speed", inverse)
        good &= ratio >= BAR_ALONE
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
