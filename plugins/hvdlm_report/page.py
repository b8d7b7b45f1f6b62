"""A self-contained HTML page about one run or several side by side; it loads no other file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape as escape_html
from pathlib import Path

from hvdlm.errors import HvdlmError
from hvdlm.io.atomic_files import replace
from hvdlm.io.safe_files import check_output
from hvdlm.io.terminal import printable
from hvdlm_report import assets, figures
from hvdlm_report.chart import Chart, draw
from hvdlm_report.comparison import compare
from hvdlm_report.figures import loss_unit
from hvdlm_report.headline import headline
from hvdlm_report.runs import RunData, read

_CURVES = (
    ("loss", "Training loss", "", True),
    ("val_loss", "Validation loss", "", False),
    ("learning_rate", "Learning rate", "", False),
    ("tokens_per_second", "Throughput", "tokens per second", True),
    ("grad_norm", "Gradient norm", "", True),
)
_COMMUNICATION_CURVES = (
    ("comm_share", "Communication", "fraction of a step spent waiting for it", True),
    ("comm_bytes", "Communicated by a rank", "bytes per step", False),
)
_CHOICES = (
    ("log", "Logarithmic", False),
    ("tokens", "Tokens instead of steps", False),
    ("smooth", "Smoothed", True),
)


def escape(text: str) -> str:
    """Return text for HTML; what a browser can't show, such as halves of surrogate pairs, becomes a question mark."""
    return escape_html(printable(text))


MAX_RUNS = 4
"""Most runs on one page: there are as many colors."""


def write(folders: Sequence[Path], output: Path, tolerance: float) -> list[str]:
    """Write the page about the runs in ``folders``.

    Returns:
        which run is better and by how much, and a sentence that compares each run with the first.

    Raises:
        HvdlmError: a folder holds no run, or the page can't be written.
    """
    check_output(output)
    runs = [read(folder) for folder in folders]
    comparisons = [(other.name, compare(runs[0], other, tolerance)) for other in runs[1:]]
    sentences = [f"{name} beside {runs[0].name}: {comparison.sentence()}" for name, comparison in comparisons]
    marks = [comparison.diverged_at for _, comparison in comparisons if comparison.diverged_at is not None]
    first = headline(runs)
    try:
        replace(output, page(runs, first, sentences, marks))
    except OSError as error:
        reason = error.strerror or os.strerror(error.errno or 0)
        raise HvdlmError(f"--output {output}: {reason}: name a file in a folder that can be written.") from error
    return [*first, *sentences]


def page(runs: Sequence[RunData], first: Sequence[str], sentences: Sequence[str], marks: Sequence[int]) -> str:
    """Return the page, with ``first`` and ``sentences`` below its title; all text that comes from a run is escaped."""
    title = f"hvdlm: {', '.join(run.name for run in runs)}"
    body = [f"<h1>{escape(title)}</h1>", _legend(runs), *(f'<p class="headline">{escape(text)}</p>' for text in first)]
    body += [f"<p>{escape(sentence)}</p>" for sentence in sentences]
    body += [_section("Figures", runs, figures.rows(runs)), _charts(runs, marks)]
    if any(run.communicates for run in runs):
        body.append(_section("Communication by purpose", runs, figures.traffic(runs)))
    body.append(_section("Seconds a step", runs, figures.step_seconds(runs)))
    body.append(_section("Memory", runs, figures.memory(runs)))
    samples = [f"<h3>{escape(r.name)}</h3><pre>{escape(r.sample)}</pre>" for r in runs if r.sample]
    body += ["<h2>Text</h2>", *samples] if samples else []
    versions = sorted({name for run in runs for name in run.summary.get("versions", {})})
    rows = [(name, [run.summary.get("versions", {}).get(name, "") for run in runs]) for name in versions]
    body.append(_section("Versions", runs, rows))
    options = list(dict.fromkeys(name for run in runs for name in run.config))
    body.append(_section("Configuration", runs, [(o, [run.config.get(o, "") for run in runs]) for o in options]))
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{assets.POLICY}">'
    head += f"<title>{escape(title)}</title><style>{assets.STYLE}</style>"
    head += '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
    text = f"{''.join(body)}<script>{assets.SCRIPT}</script>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{text}</body></html>\n"


def _charts(runs: Sequence[RunData], marks: Sequence[int]) -> str:
    """Return the charts below the choice of their axes, those of communication only where a run communicates."""
    shown = [*_CURVES, *(_COMMUNICATION_CURVES if any(run.communicates for run in runs) else ())]
    factors = [run.tokens_per_step for run in runs]
    tokens = [factor for factor in factors if factor] if all(factors) else None
    drawn = []
    for key, title, unit, smooth in shown:
        unit = loss_unit(runs[0]) if key in ("loss", "val_loss") else unit
        curves = [(run.name, run.curves.get(key, {})) for run in runs]
        drawn.append(draw(Chart(title, unit, smooth, tokens), curves, marks))
    return f'<h2>Curves</h2>{_legend(runs)}{_choices(tokens is not None)}<div class="curves">{"".join(drawn)}</div>'


def _choices(tokens: bool) -> str:
    """Return the choice of axes: the style sheet shows the drawings for it."""
    boxes = []
    for name, label, checked in _CHOICES:
        state = " checked" if checked else ""
        # Without tokens, the box is there for the style sheet's sake.
        hidden = " hidden disabled" if name == "tokens" and not tokens else ""
        boxes.append(f'<input type="checkbox" id="{name}" autocomplete="off"{state}{hidden}>')
        boxes.append(f' <label for="{name}"{hidden and " hidden"}>{label}</label>')
    return "".join(boxes)


def _legend(runs: Sequence[RunData]) -> str:
    if len(runs) == 1:
        return ""
    keys = [f'<span class="key run{number}"></span> {escape(run.name)}' for number, run in enumerate(runs)]
    return f"<p>{' &nbsp; '.join(keys)}</p>"


def _section(title: str, runs: Sequence[RunData], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Return a table with a column for each run; rows in which runs differ are marked, empty rows left out."""
    rows = [(name, cells) for name, cells in rows if any(cells)]
    if not rows:
        return ""
    head = "" if len(runs) == 1 else f"<tr><th></th>{''.join(f'<th>{escape(run.name)}</th>' for run in runs)}</tr>"
    lines = []
    for name, cells in rows:
        kind = ' class="differs"' if len(set(cells)) > 1 else ""
        lines.append(f"<tr{kind}><td>{escape(name)}</td>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    return f"<h2>{title}</h2><table>{head}{''.join(lines)}</table>"
