"""Automatic communication: tokens per second beside the best method chosen by hand, on links of several rates.

    python benchmarks/auto.py [torch tensorflow] [--rates 1e8 1e9 1e10 0] [--gaps 0 0.001] [--short]

A GPT of 10.7 million parameters trains on two hosts with one rank each (hosts.py); rate 0: no limit. With
``communication.auto``, the run measures and decides. Then its choice and every method that max_loss_gap allows (dense
sums of buckets of several sizes, and the compressors of this gap) take turns in the same processes, a block of steps
each; after three rounds, those whose median is within 15% of the best one's. The figure is the median over rounds of
the speed of the choice divided by that of the method whose median is the best.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile

from harness import FOLDER, Bar, emitted, flags, make_parser, parse, report_ratio
from hosts import Hosts, open_hosts, skipped_without_hosts
from slow_network import CONTEXT, ROWS

FULL = {"rates": [1e8, 1e9, 1e10, 0.0], "gaps": [0.0, 0.001], "rounds": 9, "layers": 6, "width": 384}
SHORT = {"rates": [1e9], "gaps": [0.001], "rounds": 1, "layers": 1, "width": 96}
OF_BEST = Bar(at_least=0.95)


def measure(hosts: Hosts, framework: str, rate: float, gap: float, o: argparse.Namespace) -> None:
    """Let the choice and all methods take turns; report the ratio."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"layers": o.layers, "width": o.width, "context": CONTEXT, "rows": ROWS * hosts.count}
        values = {"framework": framework, "folder": folder, "gap": gap, "rounds": o.rounds} | sizes
        done = hosts.run([str(FOLDER / "auto_worker.py"), *flags(values)], timeout=3600)
    if done.returncode:
        sys.exit(f"auto_worker.py, {framework} failed:\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    for line in done.stdout.splitlines():
        if "communication.auto" in line:
            print(f"  {line}", flush=True)
    results = emitted(done.stdout)
    seconds, chosen = results["seconds"][0], results["chosen"][0]
    tokens = hosts.count * ROWS * CONTEXT
    speeds = {name: tokens / statistics.median(values) for name, values in seconds.items()}
    print("  tokens/s: " + ", ".join(f"{name} {speed:.1f}" for name, speed in speeds.items()), flush=True)
    stayed = [name for name, values in seconds.items() if name != "auto" and len(values) == len(seconds["auto"])]
    best = max(stayed, key=lambda name: speeds[name])
    rounds = [(tokens / own, tokens / other) for own, other in zip(seconds["auto"], seconds[best], strict=True)]
    where = f"{framework}, {f'{rate / 1e6:g} Mbit/s' if rate else 'no limit'}, gap {gap:g}"
    report_ratio(f"tokens/s of auto / of the best by hand, {where}", rounds, OF_BEST, f"{chosen} and {best}")


@skipped_without_hosts
def main() -> None:
    """Measure every rate, framework and gap; skip where this machine can't have two hosts."""
    o = parse(make_parser(__doc__), FULL, SHORT)
    for rate in o.rates:
        with open_hosts() as hosts:
            if rate:
                hosts.shape(rate)
            for framework in o.frameworks:
                for gap in o.gaps:
                    measure(hosts, framework, rate, gap, o)


if __name__ == "__main__":
    sys.exit(main())
