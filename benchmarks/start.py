"""Processor time of a short run, beside the same run with Python's own garbage collections.

    python benchmarks/start.py [torch tensorflow] [--short]

The figure is the processor time of a whole command of a few steps, imports and graphs included, divided by that of one
whose collections examine all that was imported, as Python does by default. Both take turns. ``--ranks`` are threads.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from argparse import Namespace

from harness import Bar, Rounds, make_parser, parse, report_ratio

BAR = Bar(at_most=0.9)
FULL = {"rounds": 9, "steps": 3, "ranks": [1, 16]}
SHORT = {"rounds": 1, "steps": 1, "ranks": [1]}
RUN = """
import gc, sys
if sys.argv.pop(1) == "python":
    gc.set_threshold = gc.freeze = lambda *_: None
from hvdlm import cli
sys.exit(cli.main())
"""


def seconds(collections: str, framework: str, ranks: int, steps: int) -> float:
    """Return the processor time of a command with hvdlm's or Python's ``collections``."""
    options = ["--framework", framework, "--train.steps", str(steps), "--train.batch_size", str(max(8, ranks))]
    options += ["--model.layers", "2", "--model.width", "32", "--model.heads", "2", "--data.context", "32"]
    options += ["--backend", "threads", "--ranks", str(ranks)] if ranks > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", RUN, collections, *options, "--log.run", f"{folder}/run"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(done.stderr)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(framework: str, ranks: int, o: Namespace) -> Rounds:
    """Return the processor time of every round: with hvdlm's collections, and with Python's."""

    def pair(turn: int) -> tuple[float, float]:
        kinds = ("hvdlm", "python") if turn % 2 == 0 else ("python", "hvdlm")
        times = {kind: seconds(kind, framework, ranks, o.steps) for kind in kinds}
        return times["hvdlm"], times["python"]

    return [pair(turn) for turn in range(o.rounds)]


def main() -> int:
    """Measure each framework on each number of ranks."""
    o = parse(make_parser(__doc__), FULL, SHORT)
    for framework in o.frameworks:
        for ranks in o.ranks:
            size = f"{ranks} ranks in threads" if ranks > 1 else "1 rank"
            title = f"processor time of a run / with Python's collections, {framework}, {size}"
            report_ratio(title, measure(framework, ranks, o), BAR)
    return 0


if __name__ == "__main__":
    sys.exit(main())
