"""A self-contained HTML page about one run or several side by side, without scripts or external files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from html import escape as escape_html
from pathlib import Path
from typing import Any

from hvdlm.errors import HvdlmError
from hvdlm.io.atomic_files import replace
from hvdlm.io.terminal import printable
from hvdlm_report.chart import chart, short
from hvdlm_report.comparison import compare
from hvdlm_report.runs import RunData, read

_CURVES = (
    ("loss", "Training loss", "nats per token"),
    ("val_loss", "Validation loss", "nats per token"),
    ("learning_rate", "Learning rate", ""),
    ("tokens_per_second", "Throughput", "tokens per second"),
    ("grad_norm", "Gradient norm", ""),
    ("comm_share", "Communication", "fraction of a step spent waiting for it"),
    ("comm_bytes", "Bytes handed to collectives", "per step and rank"),
)
_FIGURES = (
    ("val_loss", "Validation loss"),
    ("perplexity", "Perplexity"),
    ("bits_per_byte", "Bits per byte"),
    ("train_loss", "Last training loss"),
    ("steps", "Steps"),
    ("stopped", "Stopped by"),
    ("skipped_steps", "Skipped steps"),
    ("tokens_per_second", "Tokens per second"),
    ("seconds", "Seconds of training"),
    ("parameters", "Parameters"),
    ("world_size", "Ranks"),
    ("framework", "Framework"),
    ("backend", "Backend"),
    ("bytes_communicated", "Bytes communicated"),
    ("compression", "Compression"),
    ("comm_share", "Fraction of time in communication"),
    ("overlap", "Overlap"),
    ("idle_share", "Idle fraction of pipeline stages"),
    ("peak_memory_bytes", "Peak memory of a rank, bytes"),
)
_STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #66707a; --paper: #fdfdfb; --line: #dfe3e6;
  --run0: #1f6feb; --run1: #d4651a; --run2: #2f8f4e; --run3: #8b4bc1; --hint: #fff3d6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8eb; --soft: #98a2ab; --paper: #15191d; --line: #30373d;
  --run0: #6ea8ff; --run1: #f0a35e; --run2: #6fcf8f; --run3: #c49bf0; --hint: #3b3115; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 1000px; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .3rem } h2 { font-size: 1.1rem; margin-top: 2rem }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(380px, 1fr)); gap: 1rem }
figure { margin: 0 } figcaption { font-weight: 600 } small, .tick { color: var(--soft); fill: var(--soft) }
.tick { font-size: 11px } .grid { stroke: var(--line) } .mark { stroke: var(--soft); stroke-dasharray: 4 3 }
polyline { fill: none; stroke-width: 1.6 } polyline.run1 { stroke-dasharray: 7 3 }
polyline.run2 { stroke-dasharray: 2 3 } polyline.run3 { stroke-dasharray: 9 3 2 3 }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; padding: .15rem .6rem .15rem 0;
  border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere }
tr.differs td { background: var(--hint) } pre { white-space: pre-wrap; border-left: 3px solid var(--line);
  padding-left: 1rem } .key { display: inline-block; width: 1.4em; height: .3em; vertical-align: middle }
"""
_COLORS = "".join(
    f"polyline.run{n} {{ stroke: var(--run{n}) }} circle.run{n} {{ fill: var(--run{n}) }} "
    f".key.run{n} {{ background: var(--run{n}) }}\n"
    for n in range(4)
)


def escape(text: str) -> str:
    """Return text for HTML; what a browser can't show, such as halves of surrogate pairs, becomes a question mark."""
    return escape_html(printable(text))


MAX_RUNS = 4
"""Most runs on one page: there are as many colors."""


def write(folders: Sequence[Path], output: Path, tolerance: float) -> list[str]:
    """Write the page about the runs in ``folders``; return a sentence that compares each run with the first.

    Raises:
        HvdlmError: a folder holds no run, or the page can't be written.
    """
    runs = [read(folder) for folder in folders]
    comparisons = [(other.name, compare(runs[0], other, tolerance)) for other in runs[1:]]
    sentences = [f"{name} beside {runs[0].name}: {comparison.sentence()}" for name, comparison in comparisons]
    marks = [comparison.diverged_at for _, comparison in comparisons if comparison.diverged_at is not None]
    try:
        replace(output, page(runs, sentences, marks))
    except OSError as error:
        reason = error.strerror or os.strerror(error.errno or 0)
        raise HvdlmError(f"--output {output}: {reason}: name a file in a folder that can be written.") from error
    return sentences


def page(runs: Sequence[RunData], sentences: Sequence[str], marks: Sequence[int]) -> str:
    """Return the page, with ``sentences`` below its title; all text that comes from a run is escaped."""
    title = f"hvdlm: {', '.join(run.name for run in runs)}"
    body = [f"<h1>{escape(title)}</h1>", _legend(runs), *(f"<p>{escape(sentence)}</p>" for sentence in sentences)]
    body += ["<h2>Figures</h2>", _table(runs, [(name, [_figure(r, key) for r in runs]) for key, name in _FIGURES])]
    curves = [chart(name, unit, {r.name: r.curves.get(key, {}) for r in runs}, marks) for key, name, unit in _CURVES]
    body += ["<h2>Curves</h2>", f'<div class="curves">{"".join(curves)}</div>']
    body += ["<h2>Communication by purpose</h2>", _table(runs, list(_traffic(runs)))]
    body += ["<h2>Memory</h2>", _table(runs, list(_memory(runs)))]
    samples = [f"<h3>{escape(r.name)}</h3><pre>{escape(r.sample)}</pre>" for r in runs if r.sample]
    body += ["<h2>Text</h2>", *samples] if samples else []
    versions = sorted({name for run in runs for name in _mapping(run.summary.get("versions"))})
    rows = [(name, [str(_mapping(r.summary.get("versions")).get(name, "")) for r in runs]) for name in versions]
    body += ["<h2>Versions</h2>", _table(runs, rows)]
    options = list(dict.fromkeys(name for run in runs for name in run.config))
    body += ["<h2>Configuration</h2>", _table(runs, [(o, [run.config.get(o, "") for run in runs]) for o in options])]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}{_COLORS}</style>'
    head += '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(body)}</body></html>\n"


def _legend(runs: Sequence[RunData]) -> str:
    if len(runs) == 1:
        return ""
    keys = [f'<span class="key run{number}"></span> {escape(run.name)}' for number, run in enumerate(runs)]
    return f"<p>{' &nbsp; '.join(keys)}</p>"


def _table(runs: Sequence[RunData], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Return a table with a column for each run; rows in which runs differ are marked, empty rows left out."""
    rows = [(name, cells) for name, cells in rows if any(cells)]
    if not rows:
        return "<p><small>No data.</small></p>"
    head = "" if len(runs) == 1 else f"<tr><th></th>{''.join(f'<th>{escape(run.name)}</th>' for run in runs)}</tr>"
    lines = []
    for name, cells in rows:
        kind = ' class="differs"' if len(set(cells)) > 1 else ""
        lines.append(f"<tr{kind}><td>{escape(name)}</td>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    return f"<table>{head}{''.join(lines)}</table>"


def _figure(run: RunData, key: str) -> str:
    value = run.summary.get(key)
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.6g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if type(value) is int else str(value)


def _traffic(runs: Sequence[RunData]) -> Iterator[tuple[str, list[str]]]:
    """Yield a row for each purpose of communication, those with the most bytes first."""
    counters = [_mapping(run.summary.get("traffic")) for run in runs]
    names = dict.fromkeys(name for counter in counters for name in counter)
    largest = {name: max(_number(_mapping(c.get(name)).get("bytes")) for c in counters) for name in names}
    for name in sorted(names, key=lambda name: -largest[name]):
        cells = []
        for counter in counters:
            entry = _mapping(counter.get(name))
            figures = [short(_number(entry.get(key))) for key in ("bytes", "calls", "seconds")]
            cells.append("{} bytes in {} calls, {} s waited".format(*figures) if entry else "")
        yield name, cells


def _memory(runs: Sequence[RunData]) -> Iterator[tuple[str, list[str]]]:
    """Yield a row for each kind of memory: its largest size on any rank, and the largest prediction."""
    for kind in ("parameters", "gradients", "optimizer", "activations"):
        cells = []
        for run in runs:
            ranks = [_mapping(rank) for rank in run.summary.get("ranks") or [] if isinstance(rank, Mapping)]
            measured = [_number(_mapping(rank.get("memory")).get(kind)) for rank in ranks]
            predicted = [_number(_mapping(rank.get("predicted_memory")).get(kind)) for rank in ranks]
            cells.append(f"{max(measured) / 2**20:,.1f} MiB (predicted {max(predicted) / 2**20:,.1f})" if ranks else "")
        yield kind, cells


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> float:
    return float(min(value, 1e100)) if type(value) in (int, float) else 0.0
