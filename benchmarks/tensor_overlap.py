"""Tensor ranks on two hosts: steps whose sums travel beside products, and steps that wait for each sum.

    python benchmarks/tensor_overlap.py [torch tensorflow] [--rates 1e9] [--layouts 1x1x2 1x1x2s] [--short]

A GPT trains with two tensor ranks on two hosts (hosts.py), in both ways by turns in the same processes: in the backward
pass, the sum of the gradient of a column-parallel product's input travels while the gradients of its weights are
computed, or before. The latter is what ``layout_worker.py`` writes as ``w``. ``1x1x2s``: with sequence parallelism.
"""

from __future__ import annotations

import argparse
import sys

from harness import FOLDER, emitted, flags, make_parser, parse, report_ratio
from hosts import Hosts, open_hosts, skipped_without_hosts

FULL = {"rates": [1e9], "layouts": ["1x1x2"], "rounds": 8, "width": 512, "layers": 4, "context": 64, "rows": 16}
SHORT = {"rates": [1e9], "layouts": ["1x1x2"], "rounds": 2, "width": 64, "layers": 1, "context": 16, "rows": 8}


def compare(hosts: Hosts, framework: str, rate: float, layout: str, o: argparse.Namespace) -> None:
    """Report how much faster steps are whose sums travel beside products."""
    names = ("rounds", "width", "layers", "context", "rows")
    options = {name: getattr(o, name) for name in names} | {"micro_batches": 1}
    worker = [str(FOLDER / "layout_worker.py"), "--framework", framework, "--layouts", f"{layout},{layout}w"]
    done = hosts.run([*worker, *flags(options)], timeout=1800)
    if done.returncode:
        sys.exit(f"layout_worker.py failed: {done.stdout[-1000:]}{done.stderr[-3000:]}")
    rounds = [(waiting, beside) for beside, waiting in emitted(done.stdout)["rounds"][0]]
    name = f"tokens/s of tensor ranks, sums beside products / before, {layout}, {framework}, {rate / 1e6:g} Mbit/s"
    report_ratio(name, rounds, None)


@skipped_without_hosts
def main() -> None:
    """Measure every rate, framework and layout; skip where this machine can't have hosts."""
    o = parse(make_parser(__doc__), FULL, SHORT)
    with open_hosts() as hosts:
        for rate in o.rates:
            hosts.shape(rate)
            for framework in o.frameworks:
                for layout in o.layouts:
                    compare(hosts, framework, rate, layout, o)


if __name__ == "__main__":
    sys.exit(main())
