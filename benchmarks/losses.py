"""Losses of compressed and of rare communication beside dense sums', on 2 and 8 ranks, with rates of their own.

    python benchmarks/losses.py                                     all that is not stored yet (days on 2 cores)
    python benchmarks/losses.py dense one_bit_adam --ranks 8        these methods, on 8 ranks
    python benchmarks/losses.py --table                             the table of what is stored
    python benchmarks/losses.py --short                             two methods, a few steps

Models have 0.8 million parameters (examples/shakespeare_char.yaml, warandpeace_char.yaml) and batches of 48 sequences,
in every row. With the first seed, every learning rate is tried; with the others, the best one. The ranks are threads of
one process: their sums are those of real ranks. Measurements are stored one by one in docs/losses.json, so that an
interrupted command continues, and docs/compression.md shows them. ``--frameworks`` compares the losses of
the first steps in TensorFlow with PyTorch's instead.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import loss_rows
from harness import Bar, make_parser, parse, report
from loss_rows import FILES, ROOT, Row, at_best, best, read, same, show, with_first_seed, write

STORED, PAGE = ROOT / "docs" / "losses.json", ROOT / "docs" / "compression.md"
_SGD = {"train.optimizer": "sgd", "train.momentum": 0, "train.clip": 0}
# In 66 rounds, an element is sent about four times: with the default outer learning rate, 1, parameters lag behind.
_FEW_ROUNDS = {"communication.compression.ratio": 0.06, "communication.local.outer_learning_rate": 4}
_FEW_ROUNDS |= {"communication.compression.error_decay": 0.9}
_BURSTS = {"train.clip": 0, "train.beta2": 0.999}  # sparse gradients come late and in bursts


def _algorithm(name: str, **options: Any) -> dict[str, Any]:
    return {f"communication.compression.{key}": value for key, value in {"algorithm": name, **options}.items()}


def _exchange(name: str, steps: int | None = None) -> dict[str, Any]:
    return {"communication.exchange": name} | ({} if steps is None else {"communication.local.steps": steps})


METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    "int8": _algorithm("int8"),
    "qsgd": _algorithm("qsgd"),
    "scaled_sign": _algorithm("scaled_sign"),
    "power_sgd": _algorithm("power_sgd", rank=4),
    "top_k": _algorithm("top_k") | _BURSTS,
    "one_bit_adam": _exchange("one_bit_adam") | _SGD,
    "zero_one_adam": _exchange("zero_one_adam") | _SGD,
    "demo": _exchange("demo") | _SGD | {"communication.compression.ratio": 0.03125},
    "diloco_30": _exchange("diloco", 30),
    "sparseloco_30": _exchange("local_sgd", 30) | _algorithm("chunked_top_k") | _FEW_ROUNDS,
    "diloco_50": _exchange("diloco", 50),
    "streaming_diloco_50": _exchange("streaming_diloco", 50) | _algorithm("int4"),
    "local_sgd_50": _exchange("local_sgd", 50),
}
FULL = {"examples": list(FILES), "ranks": [2, 8], "seeds": [1, 2, 3], "rates": [1e-3, 2e-3, 3e-3], "steps": 2000}
FULL |= {"rows": 48, "validation_share": 0.1}
SHORT = {"examples": ["shakespeare_char"], "ranks": [2], "seeds": [1], "rates": [3e-3], "steps": 4}
SHORT |= {"rows": 8, "validation_share": 0.002}
OWN_RATE = 1e-3  # of the examples' files
SAME = Bar(at_most=1e-3)
FIRST_STEPS = 200  # whose losses are compared between frameworks

KEY = ("example", "method", "ranks", "rate", "seed", "steps")


def train(row: Row, framework: str, o: argparse.Namespace) -> tuple[Row, list[float]]:
    """Train; return ``row`` with what was measured, and the losses of all steps."""
    method = METHODS[row["method"]]
    options = {
        "config": f"examples/{row['example']}.yaml",
        "data.path": o.data / FILES[row["example"]],
        "framework": framework,
        "backend": "threads",
        "ranks": row["ranks"],
        "data.validation_share": o.validation_share,
        "train.batch_size": o.rows,
        "train.learning_rate": row["rate"],
        "train.min_learning_rate": row["rate"] / 10,
        "train.seed": row["seed"],
        "train.steps": row["steps"],
        "train.warmup": min(100, row["steps"] // 4),
    }
    summary, steps = loss_rows.train(o.folder / "-".join(str(row[name]) for name in KEY), options | method)
    last = statistics.fmean(step["comm_bytes"] for step in steps[-(len(steps) // 4) :])
    measured = {
        "loss": summary["val_loss"],
        "ratio": summary["compression"],
        "last_ratio": 4 * summary["parameters"] / last,
    }
    return row | measured, [step["loss"] for step in steps]


def planned(o: argparse.Namespace, rows: Sequence[Row]) -> Iterator[Row]:
    """Yield the runs that are still to be made; ``rows`` grows meanwhile."""
    for example in o.examples:
        for ranks in o.ranks:
            for method in o.methods:
                case = {"example": example, "method": method, "ranks": ranks, "steps": o.steps}
                for rate in o.rates:
                    yield case | {"rate": rate, "seed": o.seeds[0]}
                for seed in o.seeds[1:]:
                    yield case | {"rate": best(rows, case)["rate"], "seed": seed}


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of the table in Markdown."""
    yield "| example | ranks | method | ratio; at the end | loss, 0.001 | best rate | loss (range, runs) | - dense |"
    yield "|---|---|---|---|---|---|---|---|"
    for key in dict.fromkeys(tuple(row[name] for name in ("example", "ranks", "method", "steps")) for row in rows):
        case = dict(zip(("example", "ranks", "method", "steps"), key, strict=True))
        own = next((f"{row['loss']:.3f}" for row in with_first_seed(rows, case) if row["rate"] == OWN_RATE), "-")
        chosen, dense = best(rows, case), case | {"method": "dense"}
        losses = at_best(rows, case)
        gap = f"{statistics.fmean(losses) - statistics.fmean(at_best(rows, dense)):+.3f}" if same(rows, dense) else "-"
        yield (
            f"| `{key[0]}` | {key[1]} | `{key[2]}` | {chosen['ratio']:.1f}x; {chosen['last_ratio']:.1f}x | {own} "
            f"| {chosen['rate']:g} | {statistics.fmean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f}, "
            f"{len(losses)}) | {gap} |"
        )


def store(rows: list[Row], path: Path) -> None:
    """Write the rows, in the order of the methods, and the table into the page."""
    order = list(METHODS)
    rows.sort(key=lambda row: (row["example"], row["ranks"], order.index(row["method"]), row["rate"], row["seed"]))
    write(rows, path)
    if path == STORED:
        show(table(rows), PAGE, "losses")


def compare_frameworks(o: argparse.Namespace) -> bool:
    """Compare the losses of the first steps; return whether all agree."""
    steps, agreed = min(FIRST_STEPS, o.steps), True
    for method in o.methods:
        for ranks in o.ranks:
            row = {"example": o.examples[0], "method": method, "ranks": ranks, "rate": 1e-3, "seed": 1, "steps": steps}
            curves = [train(row, framework, o)[1] for framework in ("torch", "tensorflow")]
            difference = max(abs(a - b) for a, b in zip(*curves, strict=True))
            agreed &= report(f"{method}, {ranks} ranks: largest difference between frameworks", difference, SAME)
    return agreed


def main() -> int:
    """Measure what is missing; print the table."""
    parser = make_parser(__doc__, frameworks=False)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"{', '.join(METHODS)}; default: all")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--frameworks", action="store_true", help="compare the frameworks' first losses")
    parser.add_argument("--data", type=Path, default=os.environ.get("HVDLM_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "losses", help="of the runs")
    o = parse(parser, FULL, SHORT)
    if unknown := set(o.methods) - set(METHODS):
        parser.error(f"no method {', '.join(sorted(unknown))}; known: {', '.join(METHODS)}")
    o.methods = o.methods or (["dense", "int8"] if o.short else list(METHODS))
    o.folder, o.data = o.folder.resolve(), o.data.resolve()
    o.folder.mkdir(parents=True, exist_ok=True)
    if o.frameworks:
        return 0 if compare_frameworks(o) else 1
    path = o.folder / "losses.json" if o.short else STORED
    rows: list[Row] = [] if o.short else read(path)
    for row in [] if o.table else planned(o, rows):
        if not same(rows, {name: row[name] for name in KEY}):
            measured, _ = train(row, "torch", o)
            rows.append(measured)
            store(rows, path)
            what = ", ".join(f"{name} {row[name]}" for name in KEY)
            ratios = f"{measured['ratio']:.1f}x fewer bytes, {measured['last_ratio']:.1f}x at the end"
            report(f"validation loss, {what}", measured["loss"], None, ratios)
    print("\n".join(table(rows)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
