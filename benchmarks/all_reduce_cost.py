"""Cost of hvdlm's all-reduce beside mpi4py's own, and of 200 small tensors beside one large; 2 ranks.

    python benchmarks/all_reduce_cost.py [torch tensorflow] [--backend mpi4py] [--short]

The first figure is the time of ``Group.all_reduce`` of 100 MB divided by that of mpi4py's ``Allreduce``, in place where
the framework sums in place. The second is the time of 200 tensors of 16 KB in one call divided by that of one tensor of
the same size in total. What is compared takes turns, call by call, each after a barrier; a call's time is that of the
slower rank.
"""

from __future__ import annotations

import argparse
import sys

from harness import Bar, emit, flags, make_parser, parse, report_ratio, run_worker

LARGE, SMALL = Bar(at_most=1.10), Bar(at_most=1.50)
FULL = {"backend": "mpi", "elements": 25_000_000, "calls": 30, "tensors": 200, "small_calls": 500}
SHORT = {"elements": 250_000, "calls": 2, "tensors": 20, "small_calls": 2}


def work(o: argparse.Namespace) -> None:
    """Be a rank: take turns; rank 0 emits the rounds."""
    import numpy as np

    from hvdlm.config import Config
    from hvdlm_backends.collective_benchmark import raw_call, turns
    from hvdlm_backends.connecting import connect_only

    config = Config(framework=o.frameworks[0], backend=o.backend)
    config.train.batch_size = 2
    world, framework = connect_only(config)
    make_tensor = framework.tensor
    group = world.group(range(world.size))
    array = np.ones(o.elements, np.float32)
    large = make_tensor(array)
    raw = raw_call(world, "all_reduce", array.copy(), framework.in_place)
    assert raw
    small = [make_tensor(np.ones(4096, np.float32)) for _ in range(o.tensors)]
    joined = make_tensor(np.ones(4096 * o.tensors, np.float32))

    def measure(label: str, first, second, calls: int) -> None:
        first(), second()
        rounds = turns(world, group, [first, second], calls)
        if world.rank == 0:
            emit(label, list(zip(*rounds, strict=True)))

    measure("large", lambda: group.all_reduce([large], "large"), raw, o.calls)
    measure(
        "small",
        lambda: group.all_reduce(small, "small"),
        lambda: group.all_reduce([joined], "joined"),
        o.small_calls,
    )
    world.close()


def main() -> int:
    """Measure each framework."""
    parser = make_parser(__doc__)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    o = parse(parser, FULL, SHORT)
    if o.work:
        work(o)
        return 0
    sizes = {name: getattr(o, name) for name in FULL}
    for framework in o.frameworks:
        values = run_worker("all_reduce_cost.py", 2, ["--work", framework, *flags(sizes)], 600)
        large, small = f"{4e-6 * o.elements:g} MB", f"{o.tensors} tensors of 16 KB"
        where = f"backend {o.backend}, {framework}"
        report_ratio(f"all-reduce of {large} / by mpi4py, {where}", values["large"][0], LARGE)
        report_ratio(f"all-reduce of {small} / of one tensor of their size, {where}", values["small"][0], SMALL)
    return 0


if __name__ == "__main__":
    sys.exit(main())
