"""How waiting threads should wait: tokens per second of one rank with two threads, on an idle and on a busy machine.

python benchmarks/waiting_threads.py [--framework torch] [--busy 0 1 2] [--setting GOMP_SPINCOUNT=0 ...]

Every setting is a process of its own, for OpenMP reads its variables once. The processes train in turns of a few
seconds, so that all meet the same machine. ``--busy`` single-threaded trainings run at the same time and are stopped
while they don't count. Printed is each setting's median over the rounds, and its ratio to the best setting's.
Cores used by programs other than these are printed too: an idle machine's figures need a value near 0.
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

from hvdlm.diagnostics.probes import THREADS, WAITING

WORKER = Path(__file__).with_name("waiting_worker.py")
# An empty setting is hvdlm's default; libgomp's own is 300,000 iterations.
SETTINGS = ["", "GOMP_SPINCOUNT=300000", "OMP_WAIT_POLICY=passive", "GOMP_SPINCOUNT=0", "GOMP_SPINCOUNT=1000"]
Rates = dict[str, list[float]]
_ATTEMPTS = 10  # of a turn, where other programs disturb it


class Worker:
    """A training process that works only while it has a turn."""

    def __init__(self, options: argparse.Namespace, setting: str, threads: int) -> None:
        variables = {k: v for k, v in os.environ.items() if k not in (*THREADS, *WAITING)}
        variables |= dict(pair.split("=", 1) for pair in setting.split(",") if pair)
        command = [sys.executable, str(WORKER), "--framework", options.framework, "--width", str(options.width)]
        self._errors = open(os.devnull, "w") if not options.verbose else None
        self.process = subprocess.Popen(
            [*command, "--threads", str(threads)],
            env={"TF_CPP_MIN_LOG_LEVEL": "3"} | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._answer("READY", 300)
        self.turn(0.0)  # compiles or allocates what the first step needs

    def turn(self, seconds: float) -> float:
        """Train for ``seconds`` and at least a step; return the tokens per second."""
        self.start(seconds)
        return float(self._answer("", seconds + 300))

    def start(self, seconds: float) -> None:
        """Begin a turn without waiting for its end."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()

    def _answer(self, start: str, deadline: float) -> str:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], deadline)
        line = self.process.stdout.readline() if ready else ""
        if not line or not line.startswith(start):
            sys.exit(f"a training process gave {line!r} within {deadline:.0f} s: --verbose shows its messages")
        return line

    def end(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def running(loads: list[Worker]) -> Iterator[None]:
    """Let ``loads``, which are stopped processes, run."""
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
    own = 0
    for worker in workers:
        fields = Path(f"/proc/{worker.process.pid}/stat").read_text().rpartition(")")[2].split()
        own += int(fields[11]) + int(fields[12])
    return sum(map(int, (user, nice, system, irq, softirq))) / ticks, own / ticks


def measure(workers: dict[str, Worker], loads: list[Worker], options: argparse.Namespace) -> tuple[Rates, float]:
    """Return each setting's tokens per second of every round, and how many cores other programs used meanwhile."""
    rates: Rates = {setting: [] for setting in workers}
    foreign: list[float] = []
    with running(loads):
        order = list(workers)
        for _ in range(options.rounds):
            for setting in order:
                rate, others = quiet_turn(workers[setting], [*workers.values(), *loads], options)
                rates[setting].append(rate)
                foreign.append(others)
            order = order[1:] + order[:1]
    return rates, statistics.mean(foreign)


def quiet_turn(worker: Worker, everyone: list[Worker], options: argparse.Namespace) -> tuple[float, float]:
    """Return the tokens per second of a turn, and the cores other programs used; repeat it where they used too much."""
    for _ in range(_ATTEMPTS):
        began, (machine, own) = time.monotonic(), processor_seconds(everyone)
        rate = worker.turn(options.seconds)
        later_machine, later_own = processor_seconds(everyone)
        others = (later_machine - machine - (later_own - own)) / (time.monotonic() - began)
        if others <= options.quiet:
            break
    return rate, max(0.0, others)


def report(busy: int, rates: Rates, others: float) -> None:
    """Print a line per setting: the median, its ratio to the best setting's, and that ratio's quartiles."""
    best = max(rates, key=lambda setting: statistics.median(rates[setting]))
    print(f"{busy} busy process(es); other programs used {others:.2f} cores; tokens/s, ratio to the best (quartiles):")
    for setting, measured in rates.items():
        ratios = sorted(a / b for a, b in zip(measured, rates[best], strict=True))
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        figures = f"{statistics.median(measured):8.0f}  {statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})"
        print(f"  {setting or 'default':<28} {figures}", flush=True)


def main() -> None:
    """Start the processes, measure every number of busy processes, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", default="torch", choices=["torch", "tensorflow"])
    parser.add_argument("--setting", nargs="*", default=SETTINGS, help="NAME=VALUE[,NAME=VALUE], or '' for the default")
    parser.add_argument("--busy", type=int, nargs="*", default=[0, 1, 2], help="busy processes at the same time")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--width", type=int, default=128, help="of the model")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a turn")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quiet", type=float, default=0.1, help="cores that other programs may use during a turn")
    parser.add_argument("--verbose", action="store_true", help="show the messages of the training processes")
    options = parser.parse_args()
    started: list[Worker] = []
    try:
        for threads, setting in [*((options.threads, s) for s in options.setting), *[(1, "")] * max(options.busy)]:
            started.append(Worker(options, setting, threads))
        workers = dict(zip(options.setting, started, strict=False))
        loads = started[len(workers) :]
        for load in loads:
            load.start(1e9)
            load.process.send_signal(signal.SIGSTOP)
        print(f"{options.framework}, {options.threads} threads, width {options.width}, {os.cpu_count()} cores")
        for busy in options.busy:
            report(busy, *measure(workers, loads[:busy], options))
    finally:
        for worker in started:
            worker.end()


if __name__ == "__main__":
    main()
