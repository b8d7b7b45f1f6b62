"""Streaming DiLoCo on a slow network: its speed beside ranks that exchange nothing, its peak beside blocking DiLoCo's.

    python benchmarks/streaming.py [torch tensorflow] [--rate 1e8] [--short]

A GPT of 10.7 million parameters trains on two hosts with one rank each (hosts.py), with H = 50 (--every) and 25
fragments. On a network of --rate bits per second, runs with and without the exchange take turns; the second round of H
steps counts: in the first one, TensorFlow builds the graphs of every fragment, and the last one is short. On a network
without a limit, the bytes that a host sends are read every 100 ms: the peak is the most of any such interval.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import threading
import time
from collections.abc import Iterator

from harness import Bar, make_parser, parse, report, report_ratio
from hosts import Hosts, open_hosts, skipped_without_hosts
from slow_network import METHODS, method, train

FULL = {"rate": 1e8, "rounds": 5, "peaks": 2, "layers": 6, "width": 384, "every": 50, "fragments": 25}
SHORT = {"rounds": 1, "peaks": 1, "layers": 1, "width": 96, "every": 4, "fragments": 2}
INTERVAL = 0.1  # seconds
SPEED, PEAK = Bar(at_least=0.95), Bar(at_most=0.05)
OVERLAP = 2  # the default of communication.local.overlap
STREAMING = ("streaming_diloco", "streaming_diloco in fp32")


class Peak:
    """The most bytes that a host sends in an interval."""

    def __init__(self, hosts: Hosts) -> None:
        self.bytes = 0.0
        self._hosts = hosts
        self._ended = threading.Event()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Read the counters until the block ends."""
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join(10)

    def _watch(self) -> None:
        before, then = self._hosts.sent(), time.monotonic()
        while not self._ended.wait(max(0.0, INTERVAL - (time.monotonic() - then))):
            now, sent = time.monotonic(), self._hosts.sent()
            share = INTERVAL / max(INTERVAL, now - then)  # where the machine is busy, an interval takes longer
            self.bytes = max(self.bytes, *(share * (b - a) for a, b in zip(before, sent, strict=True)))
            before, then = sent, now


def options_of(name: str, o: argparse.Namespace) -> tuple[list[str], int]:
    """Return the options of a method and the steps of a run of two rounds."""
    options, steps = method(name, o.every)
    streams = ["--communication.local.fragments", str(o.fragments)] if name in STREAMING else []
    return [*options, *streams], steps


def peak_of(hosts: Hosts, framework: str, name: str, o: argparse.Namespace) -> float:
    """Return the most bytes that a host sends in an interval of a run."""
    peak = Peak(hosts)
    with peak.watched():
        train(hosts, framework, *options_of(name, o), o)
    return peak.bytes


def speed_of(hosts: Hosts, framework: str, name: str, o: argparse.Namespace) -> float:
    """Return the tokens per second of the second round of a run."""
    options, steps = options_of(name, o)
    first = o.every + OVERLAP  # when the last fragment's first sum has been applied
    last = o.every // 4 + 1  # in them, all fragments are sent once more; without an exchange, ranks average once
    return train(hosts, framework, options, steps + OVERLAP + last, o, first=first, last=last).speed


def speeds(hosts: Hosts, framework: str, o: argparse.Namespace) -> None:
    """Let runs with and without the exchange take turns; report the ratio of their tokens per second."""
    pairs = []
    for number in range(o.rounds):
        order = ("streaming_diloco", "no exchange")[:: 1 if number % 2 == 0 else -1]
        speed = {name: speed_of(hosts, framework, name, o) for name in order}
        pairs.append((speed["streaming_diloco"], speed["no exchange"]))
    title = "tokens/s of streaming_diloco in 4 bits / of the same ranks without an exchange"
    report_ratio(f"{title}, {framework}, {o.rate / 1e6:g} Mbit/s", pairs, SPEED)


def peaks(hosts: Hosts, framework: str, o: argparse.Namespace) -> None:
    """Report the peaks of streaming DiLoCo, in 4 and in 32 bits, as shares of DiLoCo's."""
    blocking = max(peak_of(hosts, framework, "diloco", o) for _ in range(o.peaks))
    for name in STREAMING:
        streaming = max(peak_of(hosts, framework, name, o) for _ in range(o.peaks))
        details = f"{streaming / 1e6:.2f} and {blocking / 1e6:.2f} MB in 100 ms"
        report(f"peak demand of {name} / of diloco, {framework}, no limit", streaming / blocking, PEAK, details)


@skipped_without_hosts
def main() -> None:
    """Measure every framework; skip where this machine can't have two hosts."""
    o = parse(make_parser(__doc__), FULL, SHORT)
    assert {*STREAMING, "no exchange", "diloco"} <= set(METHODS)
    for framework in o.frameworks:
        with open_hosts() as hosts:
            peaks(hosts, framework, o)
            hosts.shape(o.rate)
            speeds(hosts, framework, o)


if __name__ == "__main__":
    sys.exit(main())
