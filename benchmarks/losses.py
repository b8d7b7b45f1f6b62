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
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from harness import Bar, make_parser, parse, report

ROOT = Path(__file__).resolve().parent.parent
STORED, PAGE = ROOT / "docs" / "losses.json", ROOT / "docs" / "compression.md"
BEGIN, END = "<!-- losses -->\n", "<!-- end of losses -->\n"
FILES = {"shakespeare_char": "tinyshakespeare.txt", "warandpeace_char": "warandpeace.txt"}
_ALGORITHM, _STEPS = "--communication.compression.algorithm", "--communication.local.steps"
_SGD = ("--train.optimizer", "sgd", "--train.momentum", "0", "--train.clip", "0")
# In 66 rounds, an element is sent about four times: with the default outer learning rate, 1, parameters lag behind.
_FEW_ROUNDS = ("--communication.compression.ratio", "0.06", "--communication.local.outer_learning_rate", "4")
_FEW_ROUNDS += ("--communication.compression.error_decay", "0.9")
_BURSTS = ("--train.clip", "0", "--train.beta2", "0.999")  # sparse gradients come late and in bursts


def _exchange(name: str, *options: str) -> tuple[str, ...]:
    return ("--communication.exchange", name, *options)


METHODS: dict[str, tuple[str, ...]] = {
    "dense": (),
    "int8": (_ALGORITHM, "int8"),
    "qsgd": (_ALGORITHM, "qsgd"),
    "scaled_sign": (_ALGORITHM, "scaled_sign"),
    "power_sgd": (_ALGORITHM, "power_sgd", "--communication.compression.rank", "4"),
    "top_k": (_ALGORITHM, "top_k", *_BURSTS),
    "one_bit_adam": _exchange("one_bit_adam", *_SGD),
    "zero_one_adam": _exchange("zero_one_adam", *_SGD),
    "demo": _exchange("demo", *_SGD, "--communication.compression.ratio", "0.03125"),
    "diloco_30": _exchange("diloco", _STEPS, "30"),
    "sparseloco_30": _exchange("local_sgd", _STEPS, "30", _ALGORITHM, "chunked_top_k", *_FEW_ROUNDS),
    "diloco_50": _exchange("diloco", _STEPS, "50"),
    "streaming_diloco_50": _exchange("streaming_diloco", _STEPS, "50", _ALGORITHM, "int4"),
    "local_sgd_50": _exchange("local_sgd", _STEPS, "50"),
}
FULL = {"examples": list(FILES), "ranks": [2, 8], "seeds": [1, 2, 3], "rates": [1e-3, 2e-3, 3e-3], "steps": 2000}
FULL |= {"rows": 48, "validation_share": 0.1}
SHORT = {"examples": ["shakespeare_char"], "ranks": [2], "seeds": [1], "rates": [3e-3], "steps": 4}
SHORT |= {"rows": 8, "validation_share": 0.002}
OWN_RATE = 1e-3  # of the examples' files
SAME = Bar(at_most=1e-3)
FIRST_STEPS = 200  # whose losses are compared between frameworks

Row = dict[str, Any]
KEY = ("example", "method", "ranks", "rate", "seed", "steps")


def train(row: Row, framework: str, o: argparse.Namespace) -> tuple[Row, list[float]]:
    """Train; return ``row`` with what was measured, and the losses of all steps."""
    run = o.folder / "-".join(str(row[name]) for name in KEY)
    options = ["--config", f"examples/{row['example']}.yaml", "--data.path", str(o.data / FILES[row["example"]])]
    options += ["--framework", framework, "--backend", "threads", "--ranks", str(row["ranks"])]
    options += ["--data.validation_share", str(o.validation_share)]
    options += ["--train.threads", "1", "--train.batch_size", str(o.rows), "--train.learning_rate", str(row["rate"])]
    options += ["--train.min_learning_rate", str(row["rate"] / 10), "--train.seed", str(row["seed"])]
    options += ["--train.steps", str(row["steps"]), "--train.warmup", str(min(100, row["steps"] // 4))]
    options += ["--train.eval_every", "0", "--checkpoint.every", "0", "--log.tensorboard", "false", "--log.every", "1"]
    options += ["--log.run", str(run), "--log.overwrite", "true", *METHODS[row["method"]]]
    done = subprocess.run([sys.executable, "-m", "hvdlm", *options], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"losses: the run of {row} exited with code {done.returncode}:\n{done.stderr[-2000:]}")
    summary = json.loads((run / "summary.json").read_text())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "comm_bytes" in record]
    dense = 4 * summary["parameters"]
    last = statistics.fmean(step["comm_bytes"] for step in steps[-(len(steps) // 4) :])
    measured = {
        "loss": summary["val_loss"],
        "ratio": summary["compression"],
        "last_ratio": dense / last,
    }
    shutil.rmtree(run)
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


def same(rows: Sequence[Row], case: Row) -> list[Row]:
    """Return the rows that agree with ``case`` in what it contains."""
    return [row for row in rows if all(row[name] == value for name, value in case.items())]


def with_first_seed(rows: Sequence[Row], case: Row) -> list[Row]:
    """Return the case's rows with the lowest of its seeds, which tries all rates."""
    known = same(rows, case)
    return same(known, {"seed": min((row["seed"] for row in known), default=None)})


def best(rows: Sequence[Row], case: Row) -> Row:
    """Return the row of the case's lowest loss with the first seed."""
    return min(with_first_seed(rows, case), key=lambda row: row["loss"])


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


def at_best(rows: Sequence[Row], case: Row) -> list[float]:
    """Return the losses of all seeds at the case's best rate."""
    return [row["loss"] for row in same(rows, case | {"rate": best(rows, case)["rate"]})]


def store(rows: list[Row], path: Path) -> None:
    """Write the rows, in the order of the methods, and the table into the page."""
    order = list(METHODS)
    rows.sort(key=lambda row: (row["example"], row["ranks"], order.index(row["method"]), row["rate"], row["seed"]))
    path.write_text("[\n " + ",\n ".join(json.dumps(row) for row in rows) + "\n]\n")
    if path == STORED:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + BEGIN + "\n".join(table(rows)) + "\n" + END + rest.partition(END)[2])


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
    rows: list[Row] = json.loads(path.read_text()) if path.exists() and not o.short else []
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
