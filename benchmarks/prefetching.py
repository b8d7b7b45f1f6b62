"""Waiting for data on examples/shakespeare_char.yaml, and what batches made ahead save; 2 ranks of one thread.

    python benchmarks/prefetching.py [torch tensorflow] [--data FOLDER] [--short]

The first figure is the share of a step in which a rank waits for its batch, on the slowest rank. The second is the time
of a step with ``data.prefetch``, divided by that without, where reading a batch takes longer, as from a slow file
system: the same run does blocks of steps in turns.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

from harness import FOLDER, Bar, Rounds, flags, make_parser, parse, report, report_ratio, run_worker, skip
from loop_overhead import SHORT_SIZES, SIZES

SHARE, SAVED = Bar(at_most=0.01), Bar(at_most=0.95)
FULL = SIZES | {"rounds": 20, "block": 20, "ranks": 2, "delay": 0.02}  # SIZES: the example's, too
SHORT = SHORT_SIZES | {"rounds": 1, "block": 2}
UNCOUNTED = 2  # rounds, in which graphs are built and caches fill


def measure(framework: str, text: Path, o: Namespace, delay: float) -> tuple[Rounds, list[Rounds]]:
    """Return the seconds of every round and, of each rank, the shares of waiting: with ``data.prefetch``, without."""
    sizes = {"rounds": o.rounds + UNCOUNTED, "block": o.block, "delay": delay}
    sizes |= {name: getattr(o, name) for name in SIZES}
    with tempfile.TemporaryDirectory() as folder:
        options = ["--framework", framework, "--text", str(text), "--folder", folder, *flags(sizes)]
        values = run_worker("prefetching_worker.py", o.ranks, options)
    return values["rounds"][0][UNCOUNTED:], [of_rank[UNCOUNTED:] for of_rank in values["shares"][0]]


def main() -> int:
    """Measure each framework."""
    parser = make_parser(__doc__)
    default = os.environ.get("HVDLM_DATA", FOLDER.parent.parent / "shared" / "data")
    parser.add_argument("--data", type=Path, default=default, help="folder with tinyshakespeare.txt")
    o = parse(parser, FULL, SHORT)
    text = Path(o.data).resolve() / "tinyshakespeare.txt"
    if not text.is_file():
        return skip(f"there is no {text}: name its folder, with --data or HVDLM_DATA.")
    for framework in o.frameworks:
        _, shares = measure(framework, text, o, 0.0)
        where = f"{framework}, {o.ranks} rank(s)"
        medians = [[statistics.median(turn) for turn in zip(*of_rank, strict=True)] for of_rank in shares]
        ahead, without = map(max, zip(*medians, strict=True))
        report(f"share of a step spent waiting for data, {where}", ahead, SHARE, f"data.prefetch 0: {without:.2%}")
        rounds, _ = measure(framework, text, o, o.delay)
        report_ratio(f"step with data.prefetch / without, batches read in {o.delay:g} s, {where}", rounds, SAVED)
    return 0


if __name__ == "__main__":
    sys.exit(main())
