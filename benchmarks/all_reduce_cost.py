"""What hvdlm adds to a sum: ``Group.all_reduce`` against mpi4py's, and 200 small tensors against one large.

python benchmarks/all_reduce_cost.py [torch tensorflow] [--backend mpi4py]

The first ratio is the time of ``Group.all_reduce`` of 100 MB on 2 ranks to that of mpi4py's ``Allreduce``, call by
call in turns, in place where the framework sums in place. The second is the time of 200 tensors of 16 KB in one call to
that of one tensor of the same total.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from pairing import FRAMEWORKS, Rounds, command, environment, parse_rounds, report

BARS = {"100 MB, Group.all_reduce against mpi4py": 1.10, "200 tensors of 16 KB against one of 3.2 MB": 1.50}


def work(framework: str, backend: str, most: int) -> None:
    """Be one rank: measure both ratios, print rank 0's rounds."""
    import json

    import numpy as np

    from hvdlm.communication.collective_benchmark import turns
    from hvdlm.config import Config
    from hvdlm.training import run

    config = Config(framework=framework, backend=backend)
    config.train.batch_size = 2
    met = run.meet(config)
    group = met.world.group(range(met.world.size))
    large = np.ones(25_000_000, np.float32)
    whole, mpi = met.framework.tensor(large), met.world.raw("all_reduce", large.copy(), met.framework.in_place)
    assert mpi
    small = [met.framework.tensor(np.ones(4096, np.float32)) for _ in range(200)]
    one = met.framework.tensor(np.ones(200 * 4096, np.float32))
    pairs = (
        (lambda: group.all_reduce([whole], "large"), mpi, 30),
        (lambda: group.all_reduce(small, "small"), lambda: group.all_reduce([one], "one"), 100),
    )
    for first, second, calls in pairs:
        rounds = turns(met.world, group, [first, second], min(calls, most))
        if met.world.rank == 0:
            print("ROUNDS", json.dumps(list(zip(*rounds, strict=True))), flush=True)
    met.world.close()


def main() -> int:
    """Measure both frameworks; return 1 where one is above its bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("frameworks", nargs="*", default=FRAMEWORKS)
    parser.add_argument("--backend", default="mpi", help="mpi or mpi4py")
    parser.add_argument("--calls", type=int, default=100, help="of each, at most")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.work:
        work(o.frameworks[0], o.backend, o.calls)
        return 0
    good = True
    for framework in o.frameworks:
        worker = command("all_reduce_cost.py", 2, "--work", "--backend", o.backend, "--calls", str(o.calls), framework)
        done = subprocess.run(worker, env=environment(), capture_output=True, text=True, timeout=600)
        measured: list[Rounds] = parse_rounds(done)
        for (title, bar), rounds in zip(BARS.items(), measured, strict=True):
            good &= report(f"{title}, {o.backend}, {framework}, seconds", rounds) <= bar
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
