"""Gain from compression and from local SGD on a slow network: tokens per second beside a dense all-reduce.

    python benchmarks/slow_network.py [torch tensorflow] [--rates 1e8 1e9] [--methods diloco ...] [--short]

A GPT of 10.7 million parameters trains on two hosts with one rank each (hosts.py); the dense run and that of each
method take turns. The second figure is the bytes that the network interfaces count, divided by those that hvdlm counts:
sums are sent as they are, without coding of exponents.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import Bar, check_known, make_parser, parse, report, report_ratio
from hosts import Hosts, open_hosts, skipped_without_hosts

COMPRESSION = "--communication.compression.algorithm"
STREAMING = ["--communication.exchange", "streaming_diloco"]
# Options of each method, and the optimizer steps of a run; 0: two rounds of local SGD, of --every steps each.
METHODS: dict[str, tuple[list[str], int]] = {
    "dense": ([], 8),
    "diloco": (["--communication.exchange", "diloco"], 0),
    "local_sgd": (["--communication.exchange", "local_sgd"], 0),
    "streaming_diloco": ([*STREAMING, COMPRESSION, "int4"], 0),
    "streaming_diloco in fp32": (STREAMING, 0),
    "no exchange": (["--communication.exchange", "local_sgd", "--communication.local.steps", "1000"], 0),
    **{name: ([COMPRESSION, name], 20) for name in ("fp16", "int8", "qsgd", "power_sgd", "top_k", "scaled_sign")},
}
FULL = {"rates": [1e8, 1e9], "methods": ["diloco"], "rounds": 2, "layers": 6, "width": 384, "every": 50}
SHORT = {"rates": [1e9], "methods": ["power_sgd"], "rounds": 1, "layers": 1, "width": 96}
ROWS, CONTEXT = 2, 64  # of a rank
UNCOUNTED = 2  # steps, in which frameworks build their graphs
GAINS = {1e8: Bar(at_least=10.0), 1e9: Bar(at_least=2.0)}  # for methods that communicate every 50 steps
LOCAL = ("diloco", "local_sgd", "streaming_diloco")
COUNTED = Bar(0.90, 1.10)


@dataclass
class Result:
    """Tokens per second of a run, its parameters, and the bytes that interfaces and hvdlm counted on all hosts."""

    speed: float
    parameters: int
    interface_bytes: int
    counted_bytes: int


def method(name: str, every: int) -> tuple[list[str], int]:
    """Return the options of a method, whose local SGD averages every so many steps, and the steps of a run."""
    options, steps = METHODS[name]
    return (options, steps) if steps else (["--communication.local.steps", str(every), *options], 2 * every)


def train(
    hosts: Hosts,
    framework: str,
    options: Sequence[str],
    steps: int,
    o: argparse.Namespace,
    coding: str = "",
    first: int = UNCOUNTED,
    last: int = 0,
) -> Result:
    """Train with hvdlm's ``options`` on all ranks, for ``steps`` of two rows a rank.

    ``o``: has the model's layers and width. ``coding``: 0 or 1, whether sums around a ring code exponents; else hvdlm's
    choice. ``first``, ``last``: steps at the beginning and at the end that don't count.
    """
    settings = {
        "framework": framework,
        "model.layers": o.layers,
        "model.width": o.width,
        "model.heads": 6,
        "data.context": CONTEXT,
        "data.validation_share": 0.005,  # of the evaluation at the end, which is not measured
        "train.batch_size": ROWS * hosts.ranks,
        "train.threads": 1,
        "train.steps": steps,
        "train.eval_every": 0,
        "checkpoint.every": 0,
        "log.every": 1,
        "log.tensorboard": "false",
        "log.overwrite": "true",
    }
    variables = {"HOROVOD_RING_CODING": coding} if coding else {}
    with tempfile.TemporaryDirectory() as folder:
        before = sum(hosts.sent())
        command = ["-m", "hvdlm", "--log.run", folder, *options]
        done = hosts.run([*command, *(f"--{name}={value}" for name, value in settings.items())], variables=variables)
        interface_bytes = sum(hosts.sent()) - before
        if done.returncode:
            sys.exit(f"{framework}, {' '.join(options)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((Path(folder) / "summary.json").read_text())
    measured = [line for line in lines if "loss" in line and first < line["step"] <= steps - last]
    tokens = statistics.mean(line["tokens"] for line in measured)
    seconds = statistics.mean(line["seconds"] for line in measured)
    return Result(tokens / seconds, summary["parameters"], interface_bytes, summary["bytes_communicated"])


def compare(hosts: Hosts, rate: float, framework: str, o: argparse.Namespace) -> None:
    """Let the dense run and every method take turns; report the gains and the counted bytes."""
    results: dict[str, list[Result]] = {name: [] for name in ("dense", *o.methods)}
    for number in range(o.rounds):
        for name in results if number % 2 == 0 else reversed(results):
            results[name].append(train(hosts, framework, *method(name, o.every), o, coding="0"))
    where = f"{framework}, {rate / 1e6:g} Mbit/s"
    for name, runs in results.items():
        counted = sum(run.counted_bytes for run in runs)
        measured = sum(run.interface_bytes for run in runs)
        details = f"{measured / 1e6:.2f} and {counted / 1e6:.2f} MB"
        report(f"bytes on the interfaces / bytes counted, {name}, {where}", measured / counted, COUNTED, details)
        if name != "dense":
            pairs = [(run.speed, dense.speed) for run, dense in zip(runs, results["dense"], strict=True)]
            bar = GAINS.get(rate) if name in LOCAL else None
            report_ratio(f"tokens/s of {name} / of dense all-reduce, {where}", pairs, bar)


@skipped_without_hosts
def main() -> None:
    """Measure every rate and framework; skip where this machine can't have them."""
    o = parse(make_parser(__doc__), FULL, SHORT)
    check_known("--methods", o.methods, METHODS)
    with open_hosts() as hosts:
        for rate in o.rates:
            hosts.shape(rate)
            for framework in o.frameworks:
                compare(hosts, rate, framework, o)


if __name__ == "__main__":
    sys.exit(main())
