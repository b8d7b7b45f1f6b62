"""Muon in three quarters of AdamW's steps: validation losses, both at their best of the same learning rates.

    python benchmarks/optimizers.py                                          all that is not stored yet
    python benchmarks/optimizers.py --models warandpeace_char                one model
    python benchmarks/optimizers.py --short                                  a few steps

Each optimizer follows a cosine schedule of its own length: 2,000 steps of AdamW, 1,500 of Muon. warandpeace_char is the
example, of 0.8 million parameters, on one rank: with the first seed, every rate is tried, with the others the best one.
warandpeace_bpe has 3 million parameters, 4,096 tokens and a context of 128: it is trained with the first seed, at the
rates that were best for warandpeace_char. Measurements are stored one by one in docs/optimizer_losses.json, and
docs/optimizers.md shows them.
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

STORED, PAGE = ROOT / "docs" / "optimizer_losses.json", ROOT / "docs" / "optimizers.md"
MODELS: dict[str, dict[str, Any]] = {
    "warandpeace_char": {},
    "warandpeace_bpe": {
        "data.tokenizer": "bpe",
        "data.vocab_size": 4096,
        "data.context": 128,
        "model.layers": 5,
        "model.width": 192,
        "model.heads": 6,
    },
}
TUNED = "warandpeace_char"
OPTIMIZERS = ["adamw", "muon"]
FULL = {"models": list(MODELS), "seeds": [1, 2, 3], "rates": [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2], "steps": 2000}
FULL |= {"validation_share": 0.1}
SHORT = {"models": ["warandpeace_char"], "seeds": [1], "rates": [4e-3], "steps": 4, "validation_share": 0.002}
SHARE = 0.75  # Muon's steps, of AdamW's
NOT_HIGHER = Bar(at_most=0)
KEY = ("model", "optimizer", "rate", "seed", "steps")


def train(row: Row, o: argparse.Namespace) -> Row:
    """Train; return ``row`` with the validation loss, the number of parameters and the seconds of a step."""
    options = {
        "config": "examples/warandpeace_char.yaml",
        "data.path": o.data / FILES["warandpeace_char"],
        "data.validation_share": o.validation_share,
        "train.optimizer": row["optimizer"],
        "train.learning_rate": row["rate"],
        "train.min_learning_rate": row["rate"] / 10,
        "train.seed": row["seed"],
        "train.steps": row["steps"],
        "train.warmup": min(100, row["steps"] // 4),
    }
    name = "-".join(str(row[name]) for name in KEY)
    summary, steps = loss_rows.train(o.folder / name, options | MODELS[row["model"]])
    seconds = statistics.median(step["seconds"] for step in steps)
    return row | {"loss": summary["val_loss"], "parameters": summary["parameters"], "step_seconds": seconds}


def case_of(model: str, optimizer: str, o: argparse.Namespace) -> Row:
    """Return what all runs of an optimizer have in common."""
    steps = o.steps if optimizer == "adamw" else round(SHARE * o.steps)
    return {"model": model, "optimizer": optimizer, "steps": steps}


def planned(o: argparse.Namespace, rows: Sequence[Row]) -> Iterator[Row]:
    """Yield the runs that are still to be made; ``rows`` grows meanwhile."""
    for model in o.models:
        for optimizer in OPTIMIZERS:
            case, tuned = case_of(model, optimizer, o), case_of(TUNED, optimizer, o)
            rates = o.rates if model == TUNED or not same(rows, tuned) else [best(rows, tuned)["rate"]]
            for rate in rates:
                yield case | {"rate": rate, "seed": o.seeds[0]}
            for seed in o.seeds[1:] if model == TUNED else []:
                yield case | {"rate": best(rows, case)["rate"], "seed": seed}


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of the table in Markdown."""
    yield "| model | optimizer | steps | loss by learning rate, first seed | loss at the best rate (range, runs) |"
    yield "|---|---|---|---|---|"
    for key in dict.fromkeys(tuple(row[name] for name in ("model", "optimizer", "steps")) for row in rows):
        case = dict(zip(("model", "optimizer", "steps"), key, strict=True))
        by_rate = sorted(with_first_seed(rows, case), key=lambda row: row["rate"])
        losses = at_best(rows, case)
        yield (
            f"| `{key[0]}` | {key[1]} | {key[2]} | "
            + ", ".join(f"{row['rate']:g}: {row['loss']:.3f}" for row in by_rate)
            + f" | {statistics.fmean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f}, {len(losses)}) |"
        )


def store(rows: list[Row], path: Path) -> None:
    """Write the rows, in a fixed order, and the table into the page."""
    order = list(MODELS)
    rows.sort(key=lambda row: (order.index(row["model"]), row["optimizer"], row["rate"], row["seed"]))
    write(rows, path)
    if path == STORED:
        show(table(rows), PAGE, "optimizer losses")


def main() -> int:
    """Measure what is missing; print the table and the differences."""
    parser = make_parser(__doc__, frameworks=False)
    parser.add_argument("--data", type=Path, default=os.environ.get("HVDLM_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "optimizers", help="of the runs")
    o = parse(parser, FULL, SHORT)
    if unknown := set(o.models) - set(MODELS):
        parser.error(f"no model {', '.join(sorted(unknown))}; known: {', '.join(MODELS)}")
    o.folder, o.data = o.folder.resolve(), o.data.resolve()
    o.folder.mkdir(parents=True, exist_ok=True)
    path = o.folder / "losses.json" if o.short else STORED
    rows = [] if o.short else read(path)
    for row in planned(o, rows):
        if not same(rows, {name: row[name] for name in KEY}):
            measured = train(row, o)
            rows.append(measured)
            store(rows, path)
            what = ", ".join(f"{name} {row[name]}" for name in KEY)
            report(
                f"validation loss, {what}", measured["loss"], None, f"{1e3 * measured['step_seconds']:.0f} ms a step"
            )
    print("\n".join(table(rows)), flush=True)
    reached = True
    for model in o.models:
        adamw, muon = (statistics.fmean(at_best(rows, case_of(model, name, o))) for name in OPTIMIZERS)
        reached &= report(f"{model}: loss of Muon in {SHARE:g} of the steps - AdamW's", muon - adamw, NOT_HIGHER)
    return 0 if reached or o.short else 1


if __name__ == "__main__":
    sys.exit(main())
