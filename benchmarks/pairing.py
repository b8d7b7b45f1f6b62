"""Paired measurements: what is compared runs in turns, close in time, so that the machine's moods hit both alike."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from hvdlm.diagnostics.probes import THREADS

FOLDER = Path(__file__).resolve().parent
FRAMEWORKS = ["torch", "tensorflow"]
ROWS = 16  # sequences of a rank
BLOCK = 10  # steps of a turn

Rounds = list[tuple[float, float]]


def command(script: str, ranks: int, *options: str) -> list[str]:
    """Return the command that runs a worker on ``ranks`` ranks."""
    python = [sys.executable, str(FOLDER / script), *options]
    launcher = [shutil.which("mpirun") or "mpirun", "--bind-to", "none", "--oversubscribe", "-np", str(ranks)]
    return [*launcher, *python] if ranks > 1 else python


def environment() -> dict[str, str]:
    """Return this environment, without thread counts, for containers too."""
    env = {k: v for k, v in os.environ.items() if k not in THREADS}
    return env | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}


def turns(framework: str, ranks: int, threads: int, rounds: int = 40) -> Rounds:
    """Return (hvdlm's seconds, the hand-written loop's seconds) of every round but the first three."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"rounds": rounds, "block": BLOCK, "rows": ROWS * ranks, "threads": threads}
        options = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
        worker = command("paired_worker.py", ranks, "--framework", framework, "--folder", folder, *options)
        done = subprocess.run(worker, env=environment(), capture_output=True, text=True, timeout=1200)
    return parse_rounds(done)[0][3:]


def parse_rounds(done: subprocess.CompletedProcess[str]) -> list[Rounds]:
    """Return what a worker printed behind ROUNDS, line by line."""
    lines = [line for line in done.stdout.splitlines() if line.startswith("ROUNDS ")]
    if done.returncode or not lines:
        sys.exit(f"the worker failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    return [json.loads(line.removeprefix("ROUNDS ")) for line in lines]


def report(title: str, rounds: Rounds) -> float:
    """Print the ratio of first to second, its spread and the load of the machine; return its median."""
    ratios = sorted(first / second for first, second in rounds)
    median = statistics.median(ratios)
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    first, second = (statistics.median(part) for part in zip(*rounds, strict=True))
    machine = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    spread = f"quartiles {low:.3f} to {high:.3f}, {len(ratios)} rounds"
    print(f"{title}: ratio {median:.3f} ({spread}; medians {first:.4g} and {second:.4g}; {machine})", flush=True)
    return median
