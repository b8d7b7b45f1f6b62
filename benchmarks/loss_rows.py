"""Runs whose validation losses are compared, and their rows: a run's case and what was measured, stored one by one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FILES = {"shakespeare_char": "tinyshakespeare.txt", "warandpeace_char": "warandpeace.txt"}

Row = dict[str, Any]


def train(run: Path, options: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train without checkpoints, evaluate at the end; return the summary and the records of all steps."""
    fixed = {"train.threads": 1, "train.eval_every": 0, "checkpoint.every": 0, "log.tensorboard": False, "log.every": 1}
    fixed |= {"log.run": run, "log.overwrite": True}
    given = [text for name, value in {**options, **fixed}.items() for text in (f"--{name}", _text(value))]
    done = subprocess.run([sys.executable, "-m", "hvdlm", *given], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{run.name}: the run exited with code {done.returncode}:\n{done.stderr[-2000:]}")
    summary = json.loads((run / "summary.json").read_text())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(run)
    return summary, [record for record in records if "comm_bytes" in record]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


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


def at_best(rows: Sequence[Row], case: Row) -> list[float]:
    """Return the losses of all seeds at the case's best rate."""
    return [row["loss"] for row in same(rows, case | {"rate": best(rows, case)["rate"]})]


def read(path: Path) -> list[Row]:
    """Return the rows of a file; none where there is no file."""
    rows: list[Row] = json.loads(path.read_text()) if path.exists() else []
    return rows


def write(rows: Sequence[Row], path: Path) -> None:
    """Write rows as JSON, one a line."""
    path.write_text("[\n " + ",\n ".join(json.dumps(row) for row in rows) + "\n]\n")


def show(lines: Iterable[str], page: Path, name: str) -> None:
    """Put a table's lines between the marks ``<!-- NAME -->`` and ``<!-- end of NAME -->`` of ``page``."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    before, _, rest = page.read_text().partition(begin)
    page.write_text(before + begin + "\n".join(lines) + "\n" + end + rest.partition(end)[2])
