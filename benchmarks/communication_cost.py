"""Cost of communication: 2 ranks beside 2 processes that don't communicate, and 1 rank beside a plain loop.

    python benchmarks/communication_cost.py [torch tensorflow] [--short]

The first figure is the throughput of 2 ranks with one thread each, divided by that of 2 independent one-rank runs at
the same time: what the machine can do at most. The 2 ranks and the 2 independent processes live side by side and take
turns, halted by SIGSTOP while it is not theirs. The second is the speed of 1 rank with two threads, divided by that of
a loop written by hand without Horovod (loop_overhead.py).
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
from argparse import Namespace
from pathlib import Path

from harness import Bar, Rounds, command, environment, flags, make_parser, parse, report_ratio
from loop_overhead import SHORT_SIZES, SIZES, measure

TWO_RANKS, ONE_RANK = Bar(at_least=0.95), Bar(at_least=1.0)
FULL = SIZES | {"turns": 16, "seconds": 2.5, "settle": 0.5, "warm": 20, "rounds": 25, "block": 10, "rows": 16}
SHORT = SHORT_SIZES | {"turns": 2, "seconds": 0.05, "settle": 0.02, "warm": 2, "rounds": 2, "block": 2, "rows": 4}


class Job:
    """Ranks that train without end, each counting its steps in a file; ``rows``: of a rank and step."""

    def __init__(self, script: str, ranks: int, rows: int, folder: Path, *options: str) -> None:
        folder.mkdir()
        self._rows = rows * ranks
        self._counters = [folder / f"count-{rank}" for rank in range(ranks)]
        worker = command(script, ranks, "--folder", str(folder), "--rows", str(self._rows), *options)
        self._log = folder / "log"
        with self._log.open("w") as log:
            self._launcher = subprocess.Popen(worker, env=environment(), stdout=log, stderr=log)

    def _read(self, counter: Path) -> tuple[int, int]:
        """Return (process id, steps done) of a rank; zeros before it counts."""
        data = counter.read_bytes() if counter.exists() else b""
        return struct.unpack("<qq", data) if len(data) == 16 else (0, 0)

    def sequences(self) -> int:
        """Return the sequences that all ranks have trained on so far."""
        return self._read(self._counters[0])[1] * self._rows

    def wait_until_warm(self, steps: int) -> None:
        """Wait until ``steps`` steps are done."""
        while self._read(self._counters[0])[1] < steps:
            if self._launcher.poll() is not None:
                sys.exit(f"a worker failed:\n{self._log.read_text()[-3000:]}")
            time.sleep(0.05)

    def send(self, number: int) -> None:
        """Send a signal to every rank that counts already."""
        for counter in self._counters:
            process = self._read(counter)[0]
            if process > 0:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, number)

    def halt(self) -> None:
        """Halt all ranks."""
        self.send(signal.SIGSTOP)

    def end(self) -> None:
        """End all ranks, halted or not."""
        self.send(signal.SIGKILL)
        try:
            self._launcher.wait(10)  # it collects its ranks, and removes what it has in the temporary folder
        except subprocess.TimeoutExpired:
            self._launcher.kill()
            self._launcher.wait(30)


def throughput(jobs: list[Job], settle: float, seconds: float) -> float:
    """Let ``jobs`` run together for a turn, at least a step each; return the sequences per second of all.

    What they do in the first ``settle`` seconds doesn't count.
    """
    for job in jobs:
        job.send(signal.SIGCONT)
    time.sleep(settle)
    before, began = [job.sequences() for job in jobs], time.perf_counter()
    time.sleep(seconds)
    deadline = began + 60
    while not all(job.sequences() > count for job, count in zip(jobs, before, strict=True)):
        if time.perf_counter() > deadline:
            sys.exit("a worker did no step within 60 s")
        time.sleep(0.05)
    after, ended = sum(job.sequences() for job in jobs), time.perf_counter()
    for job in jobs:
        job.halt()
    return (after - sum(before)) / (ended - began)


def take_turns(first: list[Job], second: list[Job], turns: int, settle: float, seconds: float) -> Rounds:
    """Return sequences per second of every pair of turns: of the jobs ``first``, of the jobs ``second``."""
    rounds = []
    for number in range(turns):
        one, other = (first, second) if number % 2 else (second, first)
        pair = throughput(one, settle, seconds), throughput(other, settle, seconds)
        rounds.append(pair if number % 2 else pair[::-1])
    return rounds


def scaling(framework: str, o: Namespace) -> Rounds:
    """Return sequences per second of every pair of turns: of 2 ranks, of 2 independent processes."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        jobs, sizes = [], flags({name: getattr(o, name) for name in SIZES})
        for name, ranks in (("together", 2), ("alone-a", 1), ("alone-b", 1)):
            options = ["--framework", framework, *sizes]
            jobs.append(Job("steady_worker.py", ranks, o.rows, Path(folder) / name, *options))
            stack.callback(jobs[-1].end)
            jobs[-1].wait_until_warm(o.warm)
            jobs[-1].halt()
        return take_turns(jobs[:1], jobs[1:], o.turns, o.settle, o.seconds)


def main() -> int:
    """Measure each framework."""
    o = parse(make_parser(__doc__), FULL, SHORT)
    for framework in o.frameworks:
        rounds = scaling(framework, o)
        title = f"sequences/s of 2 ranks / of 2 independent processes, {framework}"
        report_ratio(title, rounds, TWO_RANKS)
        seconds = measure(framework, 1, 2, o)
        speeds = [(plain_seconds, hvdlm_seconds) for hvdlm_seconds, plain_seconds in seconds]
        report_ratio(f"speed of 1 rank with 2 threads / of a plain loop, {framework}", speeds, ONE_RANK)
    return 0


if __name__ == "__main__":
    sys.exit(main())
