"""What hvdlm's loop costs against a loop written by hand on Horovod: the same model, turns in one process, 2 ranks.

python benchmarks/loop_overhead.py [torch tensorflow]

Prints the ratio of the times of a step, hvdlm's to the hand-written loop's (below 1: hvdlm is faster), as the median
over rounds in which each loop did a block of steps right after the other. hvdlm's time is that of the whole loop:
batches, telemetry, metrics summed over ranks in every step.
"""

from __future__ import annotations

import sys

from pairing import FRAMEWORKS, report, turns

BAR = 1.02


def main() -> int:
    """Measure both frameworks; return 1 where one is above the bar."""
    good = True
    for framework in sys.argv[1:] or FRAMEWORKS:
        ratio = report(f"loop overhead, {framework}, 2 ranks", turns(framework, ranks=2, threads=1))
        good &= ratio <= BAR
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
