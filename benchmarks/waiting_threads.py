"""How waiting threads should wait: tokens per second of one rank with two threads, on an idle and on a busy machine.

    python benchmarks/waiting_threads.py [torch tensorflow] [--busy 0 1 2] [--settings GOMP_SPINCOUNT=0 ...] [--short]

Each setting (NAME=VALUE[,NAME=VALUE]; default: hvdlm's own) is a process of its own, since OpenMP reads its variables
once. The processes train in turns of a few seconds. The figure is a setting's tokens per second divided by those of the
best setting. ``--busy`` single-threaded trainings run at the same time; they are halted while they don't count. The
details say how many cores other programs used: a turn during which they used more than ``--quiet`` is repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from harness import environment, make_parser, parse, report_ratio

WORKER = Path(__file__).with_name("waiting_worker.py")
DEFAULT = "default"
# libgomp's own default is 300,000 iterations.
SETTINGS = [DEFAULT, "GOMP_SPINCOUNT=300000", "OMP_WAIT_POLICY=passive", "GOMP_SPINCOUNT=0"]
FULL = {
    "settings": SETTINGS,
    "busy": [0, 1],
    "threads": 2,
    "width": 128,
    "seconds": 1.0,
    "rounds": 7,
    "quiet": 0.1,
    "attempts": 3,
}
SHORT = {"settings": [DEFAULT, "GOMP_SPINCOUNT=0"], "width": 32, "seconds": 0.1, "rounds": 2, "quiet": 100.0}
Rates = dict[str, list[float]]  # tokens per second of each round, by setting


class Worker:
    """A process that trains only in its turns."""

    def __init__(self, framework: str, o: argparse.Namespace, setting: str, threads: int) -> None:
        variables = environment()
        if setting != DEFAULT:
            variables |= dict(pair.split("=", 1) for pair in setting.split(","))
        options = ["--framework", framework, "--width", str(o.width), "--threads", str(threads)]
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), *options],
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if o.verbose else subprocess.DEVNULL,
            text=True,
        )
        self._read_line("READY", 300)
        self.turn(0.0)  # the first step compiles and allocates

    def turn(self, seconds: float) -> float:
        """Train for ``seconds`` and at least a step; return the tokens per second."""
        self.start(seconds)
        return float(self._read_line("", seconds + 300))

    def start(self, seconds: float) -> None:
        """Begin a turn without waiting for its end."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()

    def _read_line(self, start: str, timeout: float) -> str:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], timeout)
        line = self.process.stdout.readline() if ready else ""
        if not line or not line.startswith(start):
            sys.exit(f"a training process printed {line!r} within {timeout:.0f} s: --verbose shows its messages")
        return line

    def end(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def running(loads: list[Worker]) -> Iterator[None]:
    """Let ``loads``, which are halted, run."""
    for load in loads:
        load.process.send_signal(signal.SIGCONT)
    try:
        yield
    finally:
        for load in loads:
            load.process.send_signal(signal.SIGSTOP)


def processor_seconds(workers: list[Worker]) -> tuple[float, float]:
    """Return how many seconds of processor time the machine and ``workers`` have used."""
    ticks = os.sysconf("SC_CLK_TCK")
    user, nice, system, _, _, irq, softirq, *_ = Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    used = 0
    for worker in workers:
        fields = Path(f"/proc/{worker.process.pid}/stat").read_text().rpartition(")")[2].split()
        used += int(fields[11]) + int(fields[12])
    return sum(map(int, (user, nice, system, irq, softirq))) / ticks, used / ticks


def quiet_turn(worker: Worker, everyone: list[Worker], o: argparse.Namespace) -> tuple[float, float]:
    """Return the tokens per second of a turn, and the cores that other programs used meanwhile.

    A turn in which they used more than ``o.quiet`` is repeated, ``o.attempts`` times at most.
    """
    for _ in range(o.attempts):
        began, (machine, used) = time.monotonic(), processor_seconds(everyone)
        rate = worker.turn(o.seconds)
        later_machine, later_used = processor_seconds(everyone)
        others = (later_machine - machine - (later_used - used)) / (time.monotonic() - began)
        if others <= o.quiet:
            break
    return rate, max(0.0, others)


def measure(workers: dict[str, Worker], loads: list[Worker], o: argparse.Namespace) -> tuple[Rates, float]:
    """Return the rates of all settings, and how many cores other programs used meanwhile."""
    rates: Rates = {setting: [] for setting in workers}
    others = []
    with running(loads):
        order = list(workers)
        for _ in range(o.rounds):
            for setting in order:
                rate, cores = quiet_turn(workers[setting], [*workers.values(), *loads], o)
                rates[setting].append(rate)
                others.append(cores)
            order = order[1:] + order[:1]
    return rates, statistics.mean(others)


def compare(framework: str, o: argparse.Namespace) -> None:
    """Start the processes and report every setting's figure for every number of busy processes."""
    with contextlib.ExitStack() as stack:

        def start(setting: str, threads: int) -> Worker:
            worker = Worker(framework, o, setting, threads)
            stack.callback(worker.end)
            return worker

        workers = {setting: start(setting, o.threads) for setting in o.settings}
        loads = [start(DEFAULT, 1) for _ in range(max(o.busy))]
        for load in loads:
            load.start(1e9)
            load.process.send_signal(signal.SIGSTOP)
        for busy in o.busy:
            rates, others = measure(workers, loads[:busy], o)
            best = max(rates, key=lambda setting: statistics.median(rates[setting]))
            for setting, measured in rates.items():
                title = f"tokens/s with {setting} / with {best}, {busy} busy process(es), {framework}"
                details = f"other programs used {others:.2f} cores"
                report_ratio(title, list(zip(measured, rates[best], strict=True)), None, details)


def main() -> int:
    """Compare the settings in each framework."""
    parser = make_parser(__doc__)
    parser.add_argument("--verbose", action="store_true", help="show the messages of the training processes")
    o = parse(parser, FULL, SHORT)
    for framework in o.frameworks:
        compare(framework, o)
    return 0


if __name__ == "__main__":
    sys.exit(main())
