"""Waiting for data on examples/shakespeare_char.yaml, and the cost of making batches ahead; 2 ranks of one thread.

    python benchmarks/prefetching.py [torch tensorflow] [--data FOLDER] [--short]

The first figure is the share of a step in which a rank waits for its batch, on the slowest rank. The second is the time
of a step with batches made ahead, divided by that without: the same run does blocks of steps in turns.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from pathlib import Path

from harness import FOLDER, Bar, flags, make_parser, parse, report, report_ratio, run_worker, skip

SHARE, COST = Bar(at_most=0.01), Bar(at_most=1.02)
FULL = {"rounds": 40, "block": 20, "ranks": 2}
SHORT = {"rounds": 2, "block": 4}
UNCOUNTED = 2  # rounds, in which graphs are built and caches fill


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
        sizes = {"rounds": o.rounds + UNCOUNTED, "block": o.block}
        with tempfile.TemporaryDirectory() as folder:
            options = ["--framework", framework, "--text", str(text), "--folder", folder, *flags(sizes)]
            values = run_worker("prefetching_worker.py", o.ranks, options)
        rounds, shares = values["rounds"][0][UNCOUNTED:], [of_rank[UNCOUNTED:] for of_rank in values["shares"][0]]
        where = f"{framework}, {o.ranks} rank(s)"
        medians = [[statistics.median(turn) for turn in zip(*of_rank, strict=True)] for of_rank in shares]
        ahead, without = map(max, zip(*medians, strict=True))
        report(f"share of a step spent waiting for data, {where}", ahead, SHARE, f"without prefetching {without:.2%}")
        report_ratio(f"step with prefetching / step without, {where}", rounds, COST)
    return 0


if __name__ == "__main__":
    sys.exit(main())
