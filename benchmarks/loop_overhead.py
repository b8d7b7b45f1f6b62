"""Cost of hvdlm's training loop beside a loop written by hand on the same framework, Horovod and model; 2 ranks.

    python benchmarks/loop_overhead.py [torch tensorflow] [--short]

The figure is the time of a step, hvdlm's divided by that of the loop written by hand. Both live in the same processes
and do a block of steps each in turns; before that, their losses of a batch are compared. hvdlm's time is that of its
whole loop: batches, telemetry, metrics summed over ranks in every step.
"""

from __future__ import annotations

import sys
import tempfile
from argparse import Namespace

from harness import Bar, Rounds, flags, make_parser, parse, report_ratio, run_worker

BAR = Bar(at_most=1.02)
SIZES = {"layers": 4, "width": 128}  # of the model
SHORT_SIZES = {"layers": 1, "width": 32}
FULL = SIZES | {"rounds": 40, "block": 10, "rows": 16}
SHORT = SHORT_SIZES | {"rounds": 2, "block": 2, "rows": 2}
UNCOUNTED = 3  # rounds, in which graphs are built and caches fill


def measure(framework: str, ranks: int, threads: int, o: Namespace) -> Rounds:
    """Return the seconds of every round: hvdlm's, the plain loop's. ``o.rows``: sequences of a rank in a step."""
    sizes = {"rounds": o.rounds + UNCOUNTED, "block": o.block, "rows": o.rows * ranks, "threads": threads}
    sizes |= {name: getattr(o, name) for name in SIZES}
    with tempfile.TemporaryDirectory() as folder:
        options = ["--framework", framework, "--folder", folder, *flags(sizes)]
        values = run_worker("paired_worker.py", ranks, options)
    return values["rounds"][0][UNCOUNTED:]


def main() -> int:
    """Measure each framework."""
    o = parse(make_parser(__doc__), FULL, SHORT)
    for framework in o.frameworks:
        rounds = measure(framework, 2, 1, o)
        report_ratio(f"step of hvdlm / step of a plain loop, {framework}, 2 ranks", rounds, BAR)
    return 0


if __name__ == "__main__":
    sys.exit(main())
