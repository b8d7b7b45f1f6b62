"""All benchmarks of speed, one after the other, and a summary: ``make bench``.

    python benchmarks/run_all.py [NAME ...] [--write] [--short]

A missed bar is marked in the summary; it does not change the exit code, since other work on the machine can cause it.
The exit code is 1 where a benchmark fails to run. ``--write`` writes the summary into docs/benchmarks.md.
"""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from harness import FOLDER, SKIPPED, Figure, figures, make_parser

from hvdlm.io.machine import cores

PAGE = FOLDER.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- measured -->\n", "<!-- end -->\n"
NAMES = [
    "loop_overhead",
    "communication_cost",
    "cpu_speed",
    "all_reduce_cost",
    "without_horovod",
    "exact_sums",
    "parallel",
    "prefetching",
    "save_cost",
    "replica_check",
    "waiting_threads",
    "start",
    "compiled_steps",
    "tensorflow_chunks",
    "generation",
    "simulator",
    "dense_sums",
    "auto",
    "slow_network",
    "two_levels",
    "tensor_overlap",
    "planner",
    "planner_search",
]
OPTIONS = {"parallel": ["--ranks", "2"]}  # the table of 4 ranks has no bars and takes minutes


@dataclass
class Outcome:
    """How a benchmark ended; ``others``: cores that other programs used meanwhile."""

    name: str
    code: int
    reason: str
    figures: list[Figure]
    seconds: float
    others: float


def processor_seconds() -> tuple[float, float]:
    """Return how many seconds of processor time the machine and this process's ended children have used."""
    path = Path("/proc/stat")
    user, nice, system, _, _, irq, softirq, *_ = (
        path.read_text().split("\n")[0].split()[1:] if path.exists() else [0] * 7
    )
    machine = sum(map(int, (user, nice, system, irq, softirq))) / os.sysconf("SC_CLK_TCK")
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return machine, children.ru_utime + children.ru_stime


def run(name: str, short: bool) -> Outcome:
    """Run a benchmark, showing its output; return how it ended."""
    options = OPTIONS.get(name, []) + ["--short"] * short
    print(f"\n$ python benchmarks/{name}.py {' '.join(options)}".rstrip(), flush=True)
    began, (machine, children) = time.monotonic(), processor_seconds()
    command = [sys.executable, str(FOLDER / f"{name}.py"), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    code, seconds = process.wait(), time.monotonic() - began
    later_machine, later_children = processor_seconds()
    others = max(0.0, (later_machine - machine - (later_children - children)) / seconds)
    reason = lines[-1].strip() if code and lines else ""
    return Outcome(name, code, reason, figures("".join(lines)), seconds, others)


def table(outcomes: list[Outcome]) -> str:
    """Return a Markdown table of all figures."""
    lines = ["| figure | measured | bar | other programs, cores |", "|---|---|---|---|"]
    for outcome in outcomes:
        for figure in outcome.figures:
            mark = "" if figure.reached is not False else " (missed)"
            value, bar = f"{figure.value}{mark}", figure.bar or "-"
            lines.append(f"| {figure.title} | {value} | {bar} | {outcome.others:.2f} |")
        if outcome.code:
            kind = outcome.reason if outcome.code == SKIPPED else f"failed with exit code {outcome.code}"
            lines.append(f"| {outcome.name}.py | {kind} | - | - |")
    return "\n".join(lines) + "\n"


def conditions() -> str:
    """Return date, machine and versions in words."""
    cpu = Path("/proc/cpuinfo")
    wide = " with AVX-512" if cpu.exists() and "avx512f" in cpu.read_text() else ""
    installed = {name: _version(name) for name in ("torch", "tensorflow", "tensorflow-cpu", "horovod", "mpi4py")}
    versions = ", ".join(f"{name} {number}" for name, number in installed.items() if number)
    return f"Measured on {datetime.now(timezone.utc):%Y-%m-%d}, {cores()} {platform.machine()} cores{wide}; {versions}."


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def main() -> int:
    """Run the named benchmarks, print the summary; return 1 where one failed to run."""
    parser = make_parser(__doc__, frameworks=False)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)}; default: all")
    parser.add_argument("--write", action="store_true", help="write the summary into docs/benchmarks.md")
    o = parser.parse_args()
    if unknown := set(o.names) - set(NAMES):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; known: {', '.join(NAMES)}")
    outcomes = [run(name, o.short) for name in o.names or NAMES]
    summary = f"{conditions()}\n\n{table(outcomes)}"
    print(f"\n{summary}")
    if o.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(before + BEGIN + summary + END + rest.partition(END)[2], encoding="utf-8")
    judged = [figure.reached for outcome in outcomes for figure in outcome.figures if figure.reached is not None]
    skipped = sum(outcome.code == SKIPPED for outcome in outcomes)
    failed = [outcome.name for outcome in outcomes if outcome.code not in (0, SKIPPED)]
    minutes = sum(outcome.seconds for outcome in outcomes) / 60
    print(f"{sum(judged)} of {len(judged)} bars reached, {skipped} benchmark(s) skipped, {minutes:.0f} minutes")
    if failed:
        print(f"failed to run: {', '.join(failed)}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
