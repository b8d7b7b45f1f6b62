"""Dense sums between hosts: tokens per second beside the network's limit, and beside PyTorch's DDP over Gloo.

    python benchmarks/dense_sums.py [torch tensorflow] [--hosts 2 3 4] [--rates 1e8 1e9]
        [--methods dense fp16 power_sgd] [--backends mpi mpi4py] [--short]

A GPT of 10.7 million parameters trains with one rank on every host (hosts.py), 128 tokens a rank. All runs of a number
of hosts take turns. The limit is that of a ring, in which each of n ranks sends 2 (n - 1) / n of the gradient's bytes,
if nothing else took time. Its bar applies where the network is the bottleneck: where a run that computes the same and
sends nothing needs so little time that it would reach the bar even if nothing overlapped.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from harness import FOLDER, Bar, check_known, emitted, flags, make_parser, parse, report_ratio
from hosts import INTERFACE, Hosts, open_hosts, skipped_without_hosts
from slow_network import COMPRESSION, CONTEXT, ROWS, UNCOUNTED, train

POWER_SGD_RANK = 4
LARGE_BUCKETS = ["--communication.bucket_bytes", "25000000"]  # as DDP's: of payloads this small, few are faster
OPTIONS = {
    "dense": [],
    "fp16": [COMPRESSION, "fp16"],
    "power_sgd": [COMPRESSION, "power_sgd", "--communication.compression.rank", str(POWER_SGD_RANK), *LARGE_BUCKETS],
}
BYTES = {"dense": 4, "fp16": 2}  # of a parameter's gradient in a sum; PowerSGD's limit is computation
OF_LIMIT = {"dense": Bar(at_least=0.9), "fp16": Bar(at_least=0.85)}
OF_DDP = Bar(at_least=1.05)
ALONE = ["--communication.exchange", "local_sgd", "--communication.local.steps", "1000000"]
FULL = {"hosts": [2, 3, 4], "rates": [1e8, 1e9], "methods": list(OPTIONS), "backends": ["mpi"], "rounds": 3}
FULL |= {"steps": 8, "layers": 6, "width": 384}
SHORT = {"hosts": [3], "rates": [1e9], "methods": ["dense"], "rounds": 1, "steps": 4, "layers": 1, "width": 96}


@dataclass(frozen=True)
class Contestant:
    """What trains: hvdlm in a framework over a backend, or DDP (``framework`` is empty), by a method."""

    method: str
    framework: str = ""
    backend: str = ""

    def __str__(self) -> str:
        return f"{self.framework} {self.backend}" if self.framework else "DDP"

    def speed(self, hosts: Hosts, o: argparse.Namespace) -> float:
        """Train; return the tokens per second of all hosts, which is printed with what crossed the network."""
        if not self.framework:
            speed, sent = ddp(hosts, self.method, o), ""
        else:
            run = train(hosts, self.framework, [*OPTIONS[self.method], "--backend", self.backend], o.steps, o)
            share = run.interface_bytes / run.counted_bytes
            speed, sent = run.speed, f", {share:.3f} bytes on the network for each that ranks handed over"
        print(f"  {self.method}, {self}, {hosts.count} hosts: {speed:.1f} tokens/s{sent}", flush=True)
        return speed


def ddp(hosts: Hosts, method: str, o: argparse.Namespace) -> float:
    """Train with DDP; return the tokens per second of all hosts."""
    sizes = {"layers": o.layers, "width": o.width, "rows": ROWS, "context": CONTEXT, "steps": o.steps}
    where = {"uncounted": UNCOUNTED, "hook": method, "power_sgd_rank": POWER_SGD_RANK}
    where |= {"address": hosts.addresses[0], "interface": INTERFACE}
    done = hosts.run([str(FOLDER / "ddp_worker.py"), *flags(sizes | where)])
    if done.returncode:
        sys.exit(f"DDP, {method} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    seconds = emitted(done.stdout)["seconds"][0]
    return hosts.count * ROWS * CONTEXT / statistics.mean(seconds)


def contestants(o: argparse.Namespace) -> Iterator[Contestant]:
    """Yield all that take turns."""
    for method in o.methods:
        yield Contestant(method)
        for framework in o.frameworks:
            for backend in o.backends:
                yield Contestant(method, framework, backend)


def compare(hosts: Hosts, rate: float, alone: dict[str, float], parameters: int, o: argparse.Namespace) -> None:
    """Let all take turns; report each beside the limit and beside DDP.

    ``alone``: by framework, the seconds of a step that sends nothing.
    """
    speeds: dict[Contestant, list[float]] = {contestant: [] for contestant in contestants(o)}
    for number in range(o.rounds):
        for contestant in speeds if number % 2 == 0 else reversed(speeds):
            speeds[contestant].append(contestant.speed(hosts, o))
    for contestant, own in speeds.items():
        where = f"{contestant.method}, {contestant}, {hosts.count} hosts, {rate / 1e6:g} Mbit/s"
        if contestant.method in BYTES:
            sent = BYTES[contestant.method] * parameters * 2 * (hosts.count - 1) / hosts.count
            seconds = sent * 8 / rate
            limit = hosts.count * ROWS * CONTEXT / seconds
            bar = OF_LIMIT[contestant.method]
            needed = alone.get(contestant.framework)
            judged = needed is not None and bar.reached(seconds / (seconds + needed))
            details = f"a step sends for {seconds:.3f} s" + (f" and computes for {needed:.3f} s" if needed else "")
            rounds = [(speed, limit) for speed in own]
            report_ratio(f"tokens/s / the network's limit, {where}", rounds, bar if judged else None, details)
        if contestant.framework:
            pairs = list(zip(own, speeds[Contestant(contestant.method)], strict=True))
            report_ratio(f"tokens/s / DDP's, {where}", pairs, OF_DDP)


def measure(count: int, o: argparse.Namespace) -> None:
    """Compare at every rate on ``count`` hosts."""
    with open_hosts(count) as hosts:
        alone = {}
        for framework in o.frameworks:
            run = train(hosts, framework, ALONE, o.steps, o, last=1)  # the last step averages
            alone[framework] = count * ROWS * CONTEXT / run.speed
        for rate in o.rates:
            hosts.shape(rate)
            compare(hosts, rate, alone, run.parameters, o)


@skipped_without_hosts
def main() -> None:
    """Measure every number of hosts; skip where this machine can't have them."""
    o = parse(make_parser(__doc__), FULL, SHORT)
    check_known("--methods", o.methods, OPTIONS)
    for count in o.hosts:
        measure(count, o)


if __name__ == "__main__":
    sys.exit(main())
