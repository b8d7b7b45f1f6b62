"""What layouts cost: tokens per second, memory and bytes on 2 and 4 ranks, one thread each; table and plot.

python benchmarks/parallel.py [torch tensorflow] [--rounds 6] [--output parallel.png]

On 2 ranks all layouts run in turns in the same processes, and the ratio of tensor=2 to data=2 is the median over
rounds; on 4 ranks every layout is a launch of its own. Pipelines' idle share stands beside (p - 1) / (m + p - 1),
which knows no transfers: it is judged on 2 ranks, a core each, with micro-batches of 8 sequences, beside which they
are small.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

from pairing import FRAMEWORKS, command, environment, parse_rounds, report

from hvdlm.parallel.pipeline_schedules import idle_share

BAR, NEAR = 0.80, 0.15
MICRO_BATCHES = 8
SIZES = {"width": 512, "layers": 4, "context": 64, "rows": 16, "micro_batches": MICRO_BATCHES}
TWO, FOUR = ("2x1x1", "1x1x2", "1x2x1"), ("4x1x1", "2x1x2", "2x2x1", "1x2x2", "1x1x4", "1x4x1")


def measure(
    framework: str, ranks: int, layouts: tuple[str, ...], rounds: int, **more: int
) -> tuple[list[Any], list[dict[str, Any]]]:
    """Return (seconds of every round's blocks, what each layout told); ``more``: other sizes."""
    sizes = {**SIZES, "rounds": rounds, **more}
    options = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    worker = command("layout_worker.py", ranks, "--framework", framework, "--layouts", ",".join(layouts), *options)
    done = subprocess.run(worker, env=environment(), capture_output=True, text=True, timeout=1800)
    found = parse_rounds(done)[0]
    told = next(line for line in done.stdout.splitlines() if line.startswith("LAYOUTS "))
    return found, json.loads(told.removeprefix("LAYOUTS "))


def idles(framework: str, rounds: int) -> bool:
    """Print the idle share of two stages; return whether it is near the formula."""
    told = measure(framework, 2, ("1x2x1",), rounds, rows=64)[1][0]
    found, expected = told["idle_share"], idle_share(2, MICRO_BATCHES)
    print(f"idle share of 2 stages, {framework}: {found:.4f}, formula {expected:.4f} ({found / expected - 1:+.1%})")
    return abs(found / expected - 1) <= NEAR


def row(framework: str, told: dict[str, Any]) -> str:
    """Return a line of the table."""
    stages = int(told["layout"].split("x")[1])
    idle = f"{told['idle_share']:.3f} ({idle_share(stages, MICRO_BATCHES):.3f})" if stages > 1 else "-"
    return (
        f"| {framework} | {told['layout']} | {told['tokens_per_second']:,.0f} | {told['parameters'] / 2**20:.1f} "
        f"| {told['memory'] / 2**20:.0f} | {told['bytes'] / 2**20:.1f} | {idle} |"
    )


def plot(results: list[tuple[str, dict[str, Any]]], path: str) -> None:
    """Draw tokens per second over memory, a point for every layout."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for framework, marker in zip(FRAMEWORKS, "os", strict=True):
        chosen = [told for name, told in results if name == framework]
        x, y = [told["memory"] / 2**20 for told in chosen], [told["tokens_per_second"] for told in chosen]
        axes.scatter(x, y, marker=marker, label=framework)
        for told, a, b in zip(chosen, x, y, strict=True):
            axes.annotate(told["layout"], (a, b), textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes.set_xlabel("MiB of the rank that holds most")
    axes.set_ylabel("tokens per second")
    axes.set_title("data x pipeline x tensor, width 512")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Measure, print the table; return 1 where a bar is missed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("frameworks", nargs="*", default=FRAMEWORKS)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--output", default=None)
    o = parser.parse_args()
    good, results = True, []
    for framework in o.frameworks or FRAMEWORKS:
        rounds, told = measure(framework, 2, TWO, o.rounds)
        pairs = [(data, tensor) for data, tensor, _ in rounds]
        good &= report(f"tokens per second of tensor=2 to data=2, {framework}", pairs) >= BAR
        good &= idles(framework, o.rounds)
        for layout in FOUR:
            told += measure(framework, 4, (layout,), max(2, o.rounds // 2))[1]
        results += [(framework, one) for one in told]
    print(
        "\n| framework | layout | tokens/s | parameters, MiB | all memory, MiB | bytes a step, MiB | idle (formula) |"
    )
    print("|---|---|---|---|---|---|---|")
    for framework, one in results:
        print(row(framework, one))
    if o.output:
        plot(results, o.output)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
