"""Sums in two levels on a slow network: tokens per second and bytes beside sums in one level.

    python benchmarks/two_levels.py [torch tensorflow] [--rates 1e8] [--methods int8 dense] [--short]

A GPT of 10.7 million parameters trains on two hosts with two ranks each (hosts.py). In one level, all four ranks send
each other their gradients; in two (``parallel.data_per_node 2``), those of a host are summed first, and a rank sends
its half of that sum to one rank of the other host. Both take turns.
"""

from __future__ import annotations

import argparse
import sys

from harness import Bar, check_known, make_parser, parse, report, report_ratio
from hosts import Hosts, open_hosts, skipped_without_hosts
from slow_network import COMPRESSION, Result, train

PER_HOST = 2
METHODS = {"dense": [], "int8": [COMPRESSION, "int8"]}
LEVELS = {"one level": [], "two levels": ["--parallel.data_per_node", str(PER_HOST)]}
# Payloads are gathered: those of two ranks pass a link in place of those of three, each of half the length.
FEWER_BYTES = {"int8": Bar(at_least=2.7)}
FASTER = {"int8": Bar(at_least=1.5)}
FULL = {"rates": [1e8], "methods": ["int8", "dense"], "rounds": 2, "steps": 8, "layers": 6, "width": 384}
SHORT = {"rates": [1e9], "methods": ["int8"], "rounds": 1, "steps": 4, "layers": 1, "width": 96}


def compare(hosts: Hosts, rate: float, framework: str, method: str, o: argparse.Namespace) -> None:
    """Let one level and two take turns; report how much faster two are, and how many bytes fewer they send."""
    runs: dict[str, list[Result]] = {name: [] for name in LEVELS}
    for number in range(o.rounds):
        for name in runs if number % 2 == 0 else reversed(runs):
            options = [*METHODS[method], *LEVELS[name]]
            runs[name].append(train(hosts, framework, options, o.steps, o, coding="0"))
    where = f"{method}, {framework}, {rate / 1e6:g} Mbit/s"
    one, two = runs.values()
    sent = [sum(run.interface_bytes for run in of_level) for of_level in (one, two)]
    details = f"{sent[0] / 1e6:.2f} and {sent[1] / 1e6:.2f} MB"
    report(
        f"bytes on the interfaces, one level / two levels, {where}", sent[0] / sent[1], FEWER_BYTES.get(method), details
    )
    pairs = [(b.speed, a.speed) for a, b in zip(one, two, strict=True)]
    report_ratio(f"tokens/s, two levels / one level, {where}", pairs, FASTER.get(method))


@skipped_without_hosts
def main() -> None:
    """Measure every rate, framework and method; skip where this machine can't have hosts."""
    o = parse(make_parser(__doc__), FULL, SHORT)
    check_known("--methods", o.methods, METHODS)
    with open_hosts(per_host=PER_HOST) as hosts:
        for rate in o.rates:
            hosts.shape(rate)
            for framework in o.frameworks:
                for method in o.methods:
                    compare(hosts, rate, framework, method, o)


if __name__ == "__main__":
    sys.exit(main())
