"""Published results and applications, trained and tested by the commands of a user: ``make results``.

    python benchmarks/results.py                               all, in both frameworks (many hours on 2 cores)
    python benchmarks/results.py digits speech --frameworks torch
    python benchmarks/results.py --short                       the same commands, a few steps of each

An interrupted run resumes. The measurements are stored in docs/results.json, from which the table in docs/results.md is
written; with ``--short`` in the folder of the runs.
"""

from __future__ import annotations

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

from harness import Bar, make_parser, report

from hvdlm.io.machine import cores

ROOT = Path(__file__).resolve().parent.parent
STORED, PAGE = ROOT / "docs" / "results.json", ROOT / "docs" / "results.md"
BEGIN, END = "<!-- measured -->\n", "<!-- end -->\n"


@dataclass(frozen=True)
class Figure:
    """A figure of a result and its bar.

    Attributes:
        tested_on: the data, in words.
        name: the figure's name in the output of ``evaluate``.
        bar: what it has to reach.
        options: those of ``evaluate``; none: the figure is that of the run's own validation.
        published: the figure of the publication.
    """

    tested_on: str
    name: str
    bar: Bar
    options: tuple[str, ...] = ()
    published: str = "-"


@dataclass(frozen=True)
class Result:
    """A run and its figures.

    Attributes:
        config: its file in ``examples``, without the extension.
        files: options that name data; {} stands for the data folder.
        figures: what is measured.
        short: options of the short form.
        short_bar: the val_loss that the short form has to reach at most.
        ranks: how many train it.
        reference: a result with which the validation perplexities of the first ``steps`` steps are compared.
    """

    config: str
    files: tuple[str, ...]
    figures: tuple[Figure, ...]
    short: tuple[str, ...]
    short_bar: float
    ranks: int = 1
    reference: str = ""
    steps: int = 0


_M30K = ("--data.path", "[{}/multi30k/train.de.gz,{}/multi30k/train.en.gz]", "--data.validation_path")
_VALIDATION = "[{}/multi30k/val.de.gz,{}/multi30k/val.en.gz]"
_TEST = "[{}/multi30k/test_2016_flickr.de.gz,{}/multi30k/test_2016_flickr.en.gz]"
_CHARACTERS = (
    *("--train.steps", "25", "--train.warmup", "5", "--train.learning_rate", "3e-3"),
    *("--model.layers", "2", "--data.validation_share", "0.01"),
)
_PTB = ("--data.path", "{}/ptb/ptb.train.txt", "--data.validation_path", "{}/ptb/ptb.valid.txt")
_PTB_SHORT = (
    *("--train.steps", "20", "--log.every", "5"),
    *("--data.path", "{}/ptb/ptb.valid.txt", "--data.vocab_size", "2000"),
    *("--data.validation_path", "[]", "--data.validation_share", "0.05"),
)
_SEQUENCES = ("--speech.validation_shortest", "3", "--speech.validation_longest", "7")
RESULTS = {
    "shakespeare": Result(
        "shakespeare_char",
        ("--data.path", "{}/tinyshakespeare.txt"),
        (Figure("validation", "val_loss", Bar(at_most=1.90), published="1.88 (nanoGPT)"),),
        _CHARACTERS,
        3.0,
    ),
    "war_and_peace": Result(
        "warandpeace_char",
        ("--data.path", "{}/warandpeace.txt"),
        (Figure("validation", "val_loss", Bar(at_most=1.90)),),
        _CHARACTERS,
        3.2,
    ),
    "red_chamber": Result(
        "hongloumeng_char",
        ("--data.path", "{}/hongloumeng.txt"),
        (Figure("validation", "val_loss", Bar(at_most=4.2)),),
        _CHARACTERS,
        6.6,
    ),
    "ptb": Result(
        "ptb_lstm",
        _PTB,
        (
            Figure(
                "test", "perplexity", Bar(at_most=116.0), ("--data.validation_path", "{}/ptb/ptb.test.txt"), "115.9"
            ),
            Figure("validation", "perplexity", Bar(at_most=122.0), published="121.4"),
        ),
        _PTB_SHORT,
        7.0,
    ),
    "ptb_2_ranks": Result(
        "ptb_lstm",
        _PTB,
        (Figure("2 ranks, after 1 and 2 epochs", "perplexity / that of 1 rank - 1", Bar(at_most=0.01)),),
        _PTB_SHORT,
        7.0,
        ranks=2,
        reference="ptb",
        steps=4646,
    ),
    "digits": Result(
        "mnist_convnet",
        ("--data.path", "{}/mnist"),
        (Figure("2,000 held out", "accuracy", Bar(at_least=0.975)),),
        ("--train.steps", "60"),
        2.0,
    ),
    "speech": Result(
        "spoken_digits",
        ("--data.path", "{}/fsdd.tar"),
        (
            Figure("single digits: words wrong", "word_error_rate", Bar(at_most=0.03)),
            Figure("3 to 7 digits: words wrong", "word_error_rate", Bar(at_most=0.05), _SEQUENCES),
        ),
        (
            *("--train.steps", "25", "--train.warmup", "5", "--train.batch_size", "8", "--speech.longest", "2"),
            *("--model.layers", "1"),
        ),
        3.5,
    ),
    "translation": Result(
        "multi30k",
        (*_M30K, _VALIDATION),
        (
            Figure(
                "test_2016_flickr",
                "bleu",
                Bar(at_least=30.0),
                ("--data.validation_path", _TEST, "--translation.beams", "5"),
                "30.6 to 34",
            ),
        ),
        (
            *("--train.steps", "20", "--train.warmup", "5", "--train.batch_size", "32", "--model.width", "32"),
            *("--model.layers", "1", "--translation.bleu", "false"),
            # All batches are of one length, for which TensorFlow makes one graph.
            *("--data.path", _VALIDATION, "--data.vocab_size", "1000", "--data.context", "16"),
        ),
        6.5,
    ),
}


def call(arguments: list[str], ranks: int = 1) -> str:
    """Run ``python -m hvdlm`` in the repository's root; return its standard output."""
    launcher = ["horovodrun", "-np", str(ranks)] if ranks > 1 else []
    command = [*launcher, sys.executable, "-m", "hvdlm", *arguments]
    print("$", *launcher, "python -m hvdlm", *arguments, flush=True)
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"results: the command exited with code {done.returncode}:\n{done.stdout[-2000:]}")
    return done.stdout


def measure(name: str, framework: str, data: Path, folder: Path, short: bool) -> Iterator[tuple[Bar, dict[str, Any]]]:
    """Train a result; yield the bar and the row of each of its figures."""
    result, run = RESULTS[name], folder / f"{name}-{framework}"
    reference = folder / f"{result.reference}-{framework}"
    compared = bool(result.reference) and not short
    if compared and result.steps not in validation_losses(reference):
        raise SystemExit(
            f"results: {reference} has not been validated at step {result.steps}: measure {reference.name} first."
        )
    if not data.is_dir():
        raise SystemExit(f"results: {data} is no folder: name the one that holds the data, with --data or HVDLM_DATA.")
    files = [word.replace("{}", str(data)) for word in result.files]
    options = ["--config", f"examples/{result.config}.yaml", "--framework", framework, *files]
    if short:
        options += [word.replace("{}", str(data)) for word in result.short]
    elif result.steps:
        options += ["--train.steps", str(result.steps)]
    resume = "auto" if (run / "checkpoints").is_dir() and not short else "none"
    options += ["--log.run", str(run), "--checkpoint.resume", resume]
    options += ["--log.overwrite", str(resume == "none").lower()]
    began = time.monotonic()
    call(options, result.ranks)
    seconds = time.monotonic() - began
    summary = json.loads((run / "summary.json").read_text())
    figures = (Figure("validation", "val_loss", Bar(at_most=result.short_bar)),) if short else result.figures
    for figure in figures:
        if compared:
            value = perplexity_difference(run, reference)
        else:
            value = evaluate(figure, run, framework, data, summary)[figure.name]
        yield (
            figure.bar,
            {
                "result": name,
                "framework": framework,
                "what": figure.tested_on,
                "figure": figure.name,
                "value": value,
                "expected": str(figure.bar),
                "reached": figure.bar.reached(value),
                "published": figure.published,
                "steps": summary["steps"],
                "seconds": round(seconds),
                "resumed": resume == "auto",
                "versions": summary["versions"],
                "ranks": result.ranks,
                "cores": cores(),
            },
        )


def evaluate(figure: Figure, run: Path, framework: str, data: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of the run's own validation, or those of ``evaluate`` with the figure's options."""
    if not figure.options:
        return summary
    options = [word.replace("{}", str(data)) for word in figure.options]
    return json.loads(call(["evaluate", "--run", str(run), "--framework", framework, *options]).splitlines()[-1])


def perplexity_difference(run: Path, reference: Path) -> float:
    """Return the largest relative difference of the validation perplexities of two runs."""
    losses, expected = validation_losses(run), validation_losses(reference)
    return max(abs(math.expm1(loss - expected[step])) for step, loss in losses.items())


def validation_losses(run: Path) -> dict[int, float]:
    """Return the validation losses of a run by step; none where there is no run."""
    metrics = run / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    return {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of all measurements."""
    lines = ["| result | figure | expected | published | PyTorch | TensorFlow |", "|---|---|---|---|---|---|"]
    for key in dict.fromkeys((row["result"], row["what"], row["figure"]) for row in rows):
        same = [row for row in rows if (row["result"], row["what"], row["figure"]) == key]
        cells = []
        for framework in ("torch", "tensorflow"):
            cells.append(cell([row for row in same if row["framework"] == framework]))
        first, title = same[0], f"{key[2]}, {key[1]}"
        lines.append(f"| {key[0]} | {title} | {first['expected']} | {first['published']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(rows: list[dict[str, Any]]) -> str:
    """Return the text for the last of ``rows``, which are of one figure and framework."""
    if not rows:
        return "not measured"
    mark = "" if rows[-1]["reached"] else " (not reached)"
    return f"{rows[-1]['value']:.4g}{mark}, {duration(rows[-1])}"


def duration(row: dict[str, Any]) -> str:
    """Return how long a run trained, in words."""
    if row["resumed"]:
        return "interrupted"  # its seconds are those since it resumed
    return f"{row['seconds']:,} s on {row['cores']} {'core' if row['cores'] == 1 else 'cores'}"


def store(rows: list[dict[str, Any]], folder: Path, short: bool) -> None:
    """Add rows to the stored ones, in place of earlier ones of the same figure; write the table."""
    path = folder / "results.json" if short else STORED
    stored = json.loads(path.read_text()) if path.exists() else []
    new = {(r["result"], r["framework"], r["what"]) for r in rows}
    order = list(RESULTS)
    stored = [r for r in stored if r["result"] in order and (r["result"], r["framework"], r["what"]) not in new] + rows
    stored.sort(key=lambda row: (order.index(row["result"]), row["framework"]))
    path.write_text(json.dumps(stored, indent=1) + "\n")
    if not short:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + BEGIN + table(stored) + END + rest.partition(END)[2])


def main() -> int:
    """Measure the named results; return 1 where a bar is missed."""
    parser = make_parser(__doc__, frameworks=False)
    parser.add_argument("names", nargs="*", metavar="RESULT", help=f"{', '.join(RESULTS)}; default: all")
    parser.add_argument("--frameworks", nargs="+", default=["torch", "tensorflow"])
    parser.add_argument("--data", type=Path, default=os.environ.get("HVDLM_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "results", help="of the runs")
    o = parser.parse_args()
    if unknown := set(o.names) - set(RESULTS):
        parser.error(f"no result {', '.join(unknown)}; known: {', '.join(RESULTS)}")
    reached = True
    o.folder.mkdir(parents=True, exist_ok=True)
    for name in o.names or RESULTS:
        for framework in o.frameworks:
            measured = list(measure(name, framework, o.data.resolve(), o.folder.resolve(), o.short))
            store([row for _, row in measured], o.folder, o.short)
            for bar, row in measured:
                title = f"{name}: {row['figure']}, {row['what']}, {framework}"
                reached &= report(title, row["value"], bar)
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
