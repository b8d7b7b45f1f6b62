"""Published results and applications, trained and tested by the commands of a user: ``make results``.

    python benchmarks/results.py                               all, in both frameworks (many hours on 2 cores)
    python benchmarks/results.py digits speech --frameworks torch
    python benchmarks/results.py --quick                       the same commands, a few steps of each

A run that was interrupted goes on where it was. What was measured is kept in docs/results.json, of which the table in
docs/results.md is made; with ``--quick`` in the folder of the runs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdlm.diagnostics.probes import cores

ROOT = Path(__file__).resolve().parent.parent
KEPT, PAGE = ROOT / "docs" / "results.json", ROOT / "docs" / "results.md"
BEGIN, END = "<!-- measured -->\n", "<!-- end -->\n"
SIGNS = {"<=": lambda a, b: a <= b, ">=": lambda a, b: a >= b}


@dataclass(frozen=True)
class Figure:
    """One figure of a result: what it is of, which of ``evaluate``'s, and what it has to reach.

    ``options``: with which it is tested; none: the run's own validation text.
    """

    what: str
    name: str
    sign: str
    bar: float
    options: tuple[str, ...] = ()
    published: str = "-"


@dataclass(frozen=True)
class Result:
    """One run and its figures.

    ``files``: options that name data, {} being its folder; ``quick``: those of the short form, whose val_loss has to
    reach ``quick_bar``.
    ``ranks``: how many train it. With ``beside``, the validation losses of its ``steps`` are compared with those of
    that result.
    """

    config: str
    files: tuple[str, ...]
    figures: tuple[Figure, ...]
    quick: tuple[str, ...]
    quick_bar: float
    ranks: int = 1
    beside: str = ""
    steps: int = 0


_M30K = ("--data.path", "[{}/multi30k/train.de.gz,{}/multi30k/train.en.gz]", "--data.validation_path")
_TEST = "[{}/multi30k/test_2016_flickr.de.gz,{}/multi30k/test_2016_flickr.en.gz]"
_CHARACTERS = ("--train.steps", "40", "--train.warmup", "10", "--data.validation_share", "0.01")
_PTB = ("--data.path", "{}/ptb/ptb.train.txt", "--data.validation_path", "{}/ptb/ptb.valid.txt")
_PTB_QUICK = (
    *("--train.steps", "20", "--log.every", "5"),
    *("--data.path", "{}/ptb/ptb.valid.txt", "--data.vocab_size", "2000"),
)
_SEQUENCES = ("--speech.validation_shortest", "3", "--speech.validation_longest", "7")
RESULTS = {
    "shakespeare": Result(
        "shakespeare_char",
        ("--data.path", "{}/tinyshakespeare.txt"),
        (Figure("validation", "val_loss", "<=", 1.90, published="1.88 (nanoGPT)"),),
        _CHARACTERS,
        3.0,
    ),
    "war_and_peace": Result(
        "warandpeace_char",
        ("--data.path", "{}/warandpeace.txt"),
        (Figure("validation", "val_loss", "<=", 1.90),),
        _CHARACTERS,
        3.2,
    ),
    "red_chamber": Result(
        "hongloumeng_char",
        ("--data.path", "{}/hongloumeng.txt"),
        (Figure("validation", "val_loss", "<=", 4.2),),
        _CHARACTERS,
        6.6,
    ),
    "ptb": Result(
        "ptb_lstm",
        _PTB,
        (
            Figure("test", "perplexity", "<=", 116.0, ("--data.validation_path", "{}/ptb/ptb.test.txt"), "115.9"),
            Figure("validation", "perplexity", "<=", 122.0, published="121.4"),
        ),
        _PTB_QUICK,
        7.0,
    ),
    "ptb_2_ranks": Result(
        "ptb_lstm",
        _PTB,
        (Figure("2 ranks, after 1 and 2 epochs", "perplexity / that of 1 rank - 1", "<=", 0.01),),
        _PTB_QUICK,
        7.0,
        ranks=2,
        beside="ptb",
        steps=4646,
    ),
    "digits": Result(
        "mnist_convnet",
        ("--data.path", "{}/mnist"),
        (Figure("2,000 held out", "accuracy", ">=", 0.975),),
        ("--train.steps", "60"),
        2.0,
    ),
    "speech": Result(
        "spoken_digits",
        ("--data.path", "{}/fsdd.tar"),
        (
            Figure("single digits: words wrong", "word_error_rate", "<=", 0.03),
            Figure("3 to 7 digits: words wrong", "word_error_rate", "<=", 0.05, _SEQUENCES),
        ),
        ("--train.steps", "40", "--train.warmup", "10", "--train.batch_size", "8", "--speech.longest", "2"),
        3.5,
    ),
    "translation": Result(
        "multi30k",
        (*_M30K, "[{}/multi30k/val.de.gz,{}/multi30k/val.en.gz]"),
        (
            Figure(
                "test_2016_flickr",
                "bleu",
                ">=",
                30.0,
                ("--data.validation_path", _TEST, "--translation.beams", "5"),
                "30.6 to 34",
            ),
        ),
        (
            *("--train.steps", "40", "--train.warmup", "10", "--train.batch_size", "32", "--model.width", "32"),
            *("--model.layers", "1", "--translation.bleu", "false"),
        ),
        8.0,
    ),
}


def call(arguments: list[str], ranks: int = 1) -> str:
    """Run ``python -m hvdlm`` from the root; return what it printed."""
    launcher = ["horovodrun", "-np", str(ranks)] if ranks > 1 else []
    command = [*launcher, sys.executable, "-m", "hvdlm", *arguments]
    print("$", *launcher, "python -m hvdlm", *arguments, flush=True)
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"results: that ended with exit code {done.returncode}:\n{done.stdout[-2000:]}")
    return done.stdout


def measure(name: str, framework: str, data: Path, folder: Path, quick: bool) -> Iterator[dict[str, Any]]:
    """Train a result and yield what its figures are."""
    result, run = RESULTS[name], folder / f"{name}-{framework}"
    beside = folder / f"{result.beside}-{framework}"
    if result.beside and not quick and result.steps not in validated(beside):
        raise SystemExit(
            f"results: {beside} has not been validated at step {result.steps}: measure {beside.name} first."
        )
    files = [part.replace("{}", str(data)) for part in result.files]
    options = ["--config", f"examples/{result.config}.yaml", "--framework", framework, *files]
    if quick:
        options += [part.replace("{}", str(data)) for part in result.quick]
    elif result.steps:
        options += ["--train.steps", str(result.steps)]
    resume = "auto" if (run / "checkpoints").is_dir() and not quick else "none"
    kept = ["--log.run", str(run), "--checkpoint.resume", resume, "--log.overwrite", str(resume == "none").lower()]
    began = time.monotonic()
    call([*options, *kept], result.ranks)
    seconds = time.monotonic() - began
    summary = json.loads((run / "summary.json").read_text())
    for figure in (Figure("validation", "val_loss", "<=", result.quick_bar),) if quick else result.figures:
        if result.beside and not quick:
            value = apart(run, beside)
        else:
            value = tested(figure, run, framework, data, summary)[figure.name]
        yield {
            "result": name,
            "framework": framework,
            "what": figure.what,
            "figure": figure.name,
            "value": value,
            "expected": f"{figure.sign} {figure.bar:g}",
            "reached": SIGNS[figure.sign](value, figure.bar),
            "published": figure.published,
            "steps": summary["steps"],
            "seconds": round(seconds),
            "resumed": resume == "auto",
            "versions": summary["versions"],
            "ranks": result.ranks,
            "cores": cores(),
        }


def tested(figure: Figure, run: Path, framework: str, data: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """Return what the run's own validation gave, or what ``evaluate`` says with the figure's options."""
    if not figure.options:
        return summary
    options = [part.replace("{}", str(data)) for part in figure.options]
    return json.loads(call(["evaluate", "--run", str(run), "--framework", framework, *options]).splitlines()[-1])


def apart(run: Path, other: Path) -> float:
    """Return by how much the validation perplexities of ``run`` differ from those of ``other``, at most: a share."""
    own, others = validated(run), validated(other)
    return max(abs(math.expm1(loss - others[step])) for step, loss in own.items())


def validated(run: Path) -> dict[int, float]:
    """Return the validation losses of a run by step; none where there is no run."""
    metrics = run / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    return {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}


def table(rows: list[dict[str, Any]]) -> str:
    """Return Markdown of all that has been measured."""
    lines = ["| result | figure | expected | published | PyTorch | TensorFlow |", "|---|---|---|---|---|---|"]
    for key in dict.fromkeys((row["result"], row["what"], row["figure"]) for row in rows):
        same = [row for row in rows if (row["result"], row["what"], row["figure"]) == key]
        cells = []
        for framework in ("torch", "tensorflow"):
            own = [row for row in same if row["framework"] == framework]
            mark = "" if not own or own[-1]["reached"] else " (not reached)"
            cells.append(f"{own[-1]['value']:.4g}{mark}, {took(own[-1])}" if own else "not measured")
        first = same[0]
        what = f"{key[2]}, {key[1]}"
        lines.append(f"| {key[0]} | {what} | {first['expected']} | {first['published']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def took(row: dict[str, Any]) -> str:
    """Return how long a run trained, in words."""
    if row["resumed"]:
        return "interrupted"  # its seconds are those since it went on
    return f"{row['seconds']:,} s on {row['cores']} {'core' if row['cores'] == 1 else 'cores'}"


def keep(rows: list[dict[str, Any]], folder: Path, quick: bool) -> None:
    """Add rows to those that are kept, in place of earlier ones of the same figure; write the table."""
    path = folder / "results.json" if quick else KEPT
    known = json.loads(path.read_text()) if path.exists() else []
    new = {(r["result"], r["framework"], r["what"]) for r in rows}
    order = list(RESULTS)
    known = [r for r in known if r["result"] in order and (r["result"], r["framework"], r["what"]) not in new] + rows
    known.sort(key=lambda row: (order.index(row["result"]), row["framework"]))
    path.write_text(json.dumps(known, indent=1) + "\n")
    if not quick:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + BEGIN + table(known) + END + rest.partition(END)[2])


def main() -> int:
    """Measure what is asked for; 1 where something is not reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="RESULT", help=f"of {', '.join(RESULTS)}; none: all")
    parser.add_argument("--frameworks", nargs="+", default=["torch", "tensorflow"])
    parser.add_argument("--data", type=Path, default=os.environ.get("HVDLM_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "results", help="of the runs")
    parser.add_argument("--quick", action="store_true", help="a few steps of each, with bars of their own")
    o = parser.parse_args()
    if unknown := set(o.names) - set(RESULTS):
        parser.error(f"no result {', '.join(unknown)}; known: {', '.join(RESULTS)}")
    data, missed = o.data.resolve(), 0
    o.folder.mkdir(parents=True, exist_ok=True)
    for name in o.names or RESULTS:
        for framework in o.frameworks:
            rows = list(measure(name, framework, data, o.folder.resolve(), o.quick))
            keep(rows, o.folder, o.quick)
            for row in rows:
                missed += not row["reached"]
                word = "reached" if row["reached"] else "NOT REACHED"
                print(
                    f"{name}, {framework}: {row['figure']} {row['value']:.4g} ({row['expected']}: {word})", flush=True
                )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
