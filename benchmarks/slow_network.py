"""What compression and rarer synchronisation gain on a slow wire: tokens per second against dense all-reduce.

python benchmarks/slow_network.py [--frameworks torch tensorflow] [--rates 1e8 1e9] [--methods diloco ...]

A GPT of 10.7 million parameters, on two hosts with one rank each (two_hosts.py). Dense and method take turns, run by
run. Also checks that the bytes that hvdlm counts are those that the interfaces count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pairing import FRAMEWORKS, report
from two_hosts import Missing, TwoHosts, two_hosts

MODEL = ["--model.layers", "6", "--model.width", "384", "--model.heads", "6", "--data.context", "64"]
MODEL += ["--train.batch_size", "4", "--train.threads", "1", "--log.every", "1", "--log.tensorboard", "false"]
MODEL += ["--train.eval_every", "0", "--checkpoint.every", "0", "--data.validation_share", "0.02"]
COMPRESSION = "--communication.compression.algorithm"
METHODS = {
    "dense": ([], 8),
    "diloco": (["--communication.exchange", "diloco", "--communication.local.steps", "50"], 100),
    "local_sgd": (["--communication.exchange", "local_sgd", "--communication.local.steps", "50"], 100),
    **{name: ([COMPRESSION, name], 20) for name in ("fp16", "int8", "qsgd", "power_sgd", "top_k", "scaled_sign")},
}
SKIPPED = 2  # steps: frameworks build their graphs in the first
BARS = {1e8: 10.0, 1e9: 2.0}
COUNTED = 0.10  # how far the interfaces' bytes may be from hvdlm's


@dataclass
class Ran:
    """A run's speed (tokens per second), and the bytes that interfaces and hvdlm counted, over both hosts."""

    speed: float
    wire: int
    counted: int
    val_loss: float


def train(hosts: TwoHosts, framework: str, method: str) -> Ran:
    """Train with a method."""
    options, steps = METHODS[method]
    with tempfile.TemporaryDirectory() as folder:
        before = sum(hosts.sent())
        command = ["-m", "hvdlm", "--framework", framework, "--log.run", folder, "--log.overwrite", "true"]
        done = hosts.run([*command, "--train.steps", str(steps), *MODEL, *options])
        wire = sum(hosts.sent()) - before
        if done.returncode:
            sys.exit(f"{framework}, {method} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((Path(folder) / "summary.json").read_text())
    assert summary["parameters"] > 10_000_000
    measured = [line for line in lines if "loss" in line and line["step"] > SKIPPED]
    tokens = statistics.mean(line["tokens"] for line in measured)
    seconds = statistics.mean(line["seconds"] for line in measured)
    return Ran(tokens / seconds, wire, summary["bytes_communicated"], summary["val_loss"])


def main() -> int:
    """Measure every framework, rate and method; return 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frameworks", nargs="+", default=FRAMEWORKS, choices=FRAMEWORKS)
    parser.add_argument("--rates", nargs="+", type=float, default=list(BARS), help="bits per second")
    parser.add_argument("--methods", nargs="+", default=["diloco"], choices=[m for m in METHODS if m != "dense"])
    parser.add_argument("--rounds", type=int, default=2)
    o = parser.parse_args()
    good = True
    try:
        with two_hosts() as hosts:
            for rate in o.rates:
                hosts.shape(rate)
                for framework in o.frameworks:
                    good &= compare(hosts, rate, framework, o.methods, o.rounds)
    except Missing as reason:
        print(f"slow_network: {reason}", file=sys.stderr)
        return 2
    return 0 if good else 1


def compare(hosts: TwoHosts, rate: float, framework: str, methods: list[str], rounds: int) -> bool:
    """Let dense and every method take turns; return whether the best method and the counters do."""
    found: dict[str, list[Ran]] = {name: [] for name in ("dense", *methods)}
    for number in range(rounds):
        for name in found if number % 2 == 0 else reversed(found):
            found[name].append(train(hosts, framework, name))
    gains, good = [], True
    for name, runs in found.items():
        wire, counted = sum(r.wire for r in runs), sum(r.counted for r in runs)
        print(
            f"{framework}, {rate / 1e6:g} Mbit/s, {name}: {statistics.mean(r.speed for r in runs):.1f} tokens/s; "
            f"interfaces {wire / 1e6:.2f} MB, counted {counted / 1e6:.2f} MB, ratio {wire / counted:.3f}",
            flush=True,
        )
        good &= abs(wire / counted - 1) <= COUNTED
        if name != "dense":
            pairs = [(run.speed, dense.speed) for run, dense in zip(runs, found["dense"], strict=True)]
            gains.append(report(f"{framework}, {rate / 1e6:g} Mbit/s, {name} against dense, tokens/s", pairs))
    return good and max(gains) >= BARS.get(rate, 0.0)


if __name__ == "__main__":
    sys.exit(main())
