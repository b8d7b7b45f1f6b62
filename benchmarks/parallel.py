"""Cost of layouts: tokens per second, memory and bytes on 2 and 4 ranks with one thread each; table and plot.

    python benchmarks/parallel.py [torch tensorflow] [--ranks 2 4] [--output parallel.png] [--short]

On 2 ranks all layouts take turns in the same processes; the first figure is tokens per second with two tensor ranks
divided by those with two data ranks. The second is the idle share of two pipeline stages divided by that of the formula
(p - 1) / (m + p - 1), with p stages and m micro-batches, which leaves transfers out: its micro-batches have 8
sequences, so that transfers are small. The third is the idle share of two stages with two virtual stages on each rank
(interleaved 1F1B) divided by that without, in turns, with few micro-batches, so that there is much to save; the formula
is (p - 1) / (v m + p - 1) with v virtual stages. On 4 ranks each layout is a launch of its own. Layouts are written as
data x pipeline x tensor.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from harness import FRAMEWORKS, Bar, flags, make_parser, parse, report, report_ratio, run_worker

from hvdlm.planning.closed_forms import idle_share

TENSOR, IDLE, INTERLEAVED = Bar(at_least=0.80), Bar(0.85, 1.15), Bar(at_most=0.80)
FULL = {"ranks": [2, 4], "rounds": 6, "width": 512, "layers": 4, "context": 64, "rows": 16, "idle_rows": 64}
SHORT = {"ranks": [2], "rounds": 2, "width": 64, "layers": 2, "context": 16, "idle_rows": 16}
MICRO_BATCHES, FEW = 8, 4
TWO_RANKS = ("2x1x1", "1x1x2", "1x2x1")
FOUR_RANKS = ("4x1x1", "2x1x2", "2x2x1", "1x2x2", "1x1x4", "1x4x1")

Measurements = dict[str, Any]  # of a layout, as layout_worker.py emits them


def measure(
    framework: str, ranks: int, layouts: tuple[str, ...], o: argparse.Namespace, **sizes: int
) -> tuple[list[Any], list[Measurements]]:
    """Return the seconds of every round's blocks, and the measurements of every layout; ``sizes`` replace options."""
    names = ("rounds", "width", "layers", "context", "rows")
    options = {name: getattr(o, name) for name in names} | {"micro_batches": MICRO_BATCHES} | sizes
    worker = ["--framework", framework, "--layouts", ",".join(layouts), *flags(options)]
    values = run_worker("layout_worker.py", ranks, worker)
    return values["rounds"][0], values["layouts"][0]


def measure_two_ranks(framework: str, o: argparse.Namespace) -> list[Measurements]:
    """Report both figures; return the measurements of all layouts."""
    rounds, measurements = measure(framework, 2, TWO_RANKS, o)
    pairs = [(data, tensor) for data, tensor, _ in rounds]
    report_ratio(f"tokens/s with 2 tensor ranks / with 2 data ranks, {framework}", pairs, TENSOR)
    [pipeline] = measure(framework, 2, ("1x2x1",), o, rows=o.idle_rows)[1]
    share, expected = pipeline["idle_share"], idle_share(2, MICRO_BATCHES)
    title = f"idle share of 2 stages / (p - 1) / (m + p - 1), {framework}"
    report(title, share / expected, IDLE, f"{share:.4f} and {expected:.4f}")
    sizes = {"rows": o.idle_rows, "layers": 2 * o.layers, "micro_batches": FEW}
    plain, virtual = (one["idle_share"] for one in measure(framework, 2, ("1x2x1", "1x2x1v2"), o, **sizes)[1])
    title = f"idle share of 2 stages with 2 virtual stages a rank / without, {framework}"
    formulas = f"formulas {idle_share(2, FEW, 2):.4f} and {idle_share(2, FEW):.4f}"
    report(title, virtual / plain, INTERLEAVED, f"{virtual:.4f} and {plain:.4f}; {formulas}")
    return measurements


def row(framework: str, layout: Measurements) -> str:
    """Return a line of the table."""
    stages = int(layout["layout"].split("x")[1])
    idle = f"{layout['idle_share']:.3f} ({idle_share(stages, MICRO_BATCHES):.3f})" if stages > 1 else "-"
    return (
        f"| {framework} | {layout['layout']} | {layout['tokens_per_second']:,.0f} "
        f"| {layout['parameters'] / 2**20:.1f} | {layout['memory'] / 2**20:.0f} | {layout['bytes'] / 2**20:.1f} "
        f"| {idle} |"
    )


def plot(results: list[tuple[str, Measurements]], title: str, path: str) -> None:
    """Draw tokens per second over memory, a point per layout."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for framework, marker in zip(FRAMEWORKS, "os", strict=True):
        layouts = [layout for name, layout in results if name == framework]
        x = [layout["memory"] / 2**20 for layout in layouts]
        y = [layout["tokens_per_second"] for layout in layouts]
        axes.scatter(x, y, marker=marker, label=framework)
        for layout, point in zip(layouts, zip(x, y, strict=True), strict=True):
            axes.annotate(layout["layout"], point, textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes.set_xlabel("MiB on the rank that holds most")
    axes.set_ylabel("tokens per second")
    axes.set_title(title)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Measure each framework, print the table, draw the plot if one is asked for."""
    parser = make_parser(__doc__)
    parser.add_argument("--output", help="the plot's file")
    o = parse(parser, FULL, SHORT)
    results = []
    for framework in o.frameworks:
        measurements = measure_two_ranks(framework, o) if 2 in o.ranks else []
        for layout in FOUR_RANKS if 4 in o.ranks else ():
            measurements += measure(framework, 4, (layout,), o, rounds=max(2, o.rounds // 2))[1]
        results += [(framework, layout) for layout in measurements]
    names = ("framework", "layout", "tokens/s", "parameters, MiB", "memory, MiB", "bytes a step, MiB", "idle (formula)")
    print("", f"| {' | '.join(names)} |", "|---" * len(names) + "|", sep="\n")
    for framework, layout in results:
        print(row(framework, layout))
    if o.output:
        plot(results, f"data x pipeline x tensor, width {o.width}", o.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
