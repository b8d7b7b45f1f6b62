"""Speed and memory of the simulator, and wasted time beside Daly's formula.

    python benchmarks/simulator.py [--short]

It simulates 4,096 ranks for 10,000 steps, with stragglers and jitter: data-parallel ranks with 64 buckets and 4
micro-batches, the same with DiLoCo, and 128 x 8 x 4 (data x pipeline x tensor) ranks with 16 micro-batches; each also
without each cause, to attribute the time to them. Then runs with failures, saved at half, once and twice the best
interval: the share of their time that is no work, beside that of Daly's formula.
"""

from __future__ import annotations

import resource
import sys
import time

import numpy as np
from harness import Bar, make_parser, parse, report

from hvdlm.parallel.mesh import Mesh
from hvdlm.planning.simulator import Disturbances, simulate
from hvdlm.planning.simulator_costs import Bucket, StageCosts, StepCosts
from hvdlm.planning.simulator_failures import Failures, best_interval, expected_seconds, survive

SECONDS, GIGABYTES, WASTE = Bar(at_most=60), Bar(at_most=2), Bar(0.95, 1.05)
FULL = {"ranks": 4096, "steps": 10_000, "failures": 30_000}
SHORT = {"ranks": 256, "steps": 20, "failures": 1000}
DISTURBED = Disturbances(0.001, 0.001, 1.3, 0.01, 0.05)


def layouts(ranks: int) -> dict[str, StepCosts]:
    """Return the costs of steps in three layouts."""
    buckets = tuple(Bucket((index + 1) / 64, 0.004) for index in range(64))
    stage = StageCosts(0.1, 0.2, buckets=buckets, update=0.01, round=0.3)
    small = {"metrics": 1e-4, "vote": 1e-4}
    tensor = StageCosts(0.1, 0.2, 0.01, 0.02, buckets, 0.01)
    return {
        "data-parallel": StepCosts(Mesh(ranks, 1, 1), (stage,), 4, **small),
        "DiLoCo": StepCosts(Mesh(ranks, 1, 1), (stage,), 4, every=50, **small),
        "data x 8 x 4": StepCosts(Mesh(ranks // 32, 8, 4), (tensor,) * 8, 16, message=0.01, norm=1e-3, **small),
    }


def measure_speed(ranks: int, steps: int) -> None:
    """Report the seconds of each simulation, and the memory of this process after all."""
    for name, costs in layouts(ranks).items():
        began = time.perf_counter()
        result = simulate(costs, DISTURBED, steps)
        seconds = time.perf_counter() - began
        details = f"efficiency {result.efficiency:.3f}"
        report(f"seconds to simulate {ranks:,} ranks, {steps:,} steps, {name}", seconds, SECONDS, details)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    report("peak memory of the simulations, GB", peak, GIGABYTES)


def measure_waste(count: int) -> None:
    """Report the wasted time of simulated runs relative to that of the formula."""
    failures = Failures(mtbf=20_000.0, restart=300.0, save=60.0)
    for name, factor in (("half", 0.5), ("once", 1.0), ("twice", 2.0)):
        interval, work = factor * best_interval(failures), count * failures.mtbf
        result = survive(work, interval, failures, np.random.default_rng(1))
        assert result is not None
        formula = 1 - work / expected_seconds(work, interval, failures)
        details = f"{100 * result.wasted:.2f}% and {100 * formula:.2f}%, {result.failures:,} failures"
        report(f"wasted time / Daly's formula, {name} the best interval", result.wasted / formula, WASTE, details)


def main() -> int:
    """Measure speed, memory and waste."""
    o = parse(make_parser(__doc__, frameworks=False), FULL, SHORT)
    measure_speed(o.ranks, o.steps)
    measure_waste(o.failures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
