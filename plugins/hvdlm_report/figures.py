"""The figures of a run's summary as text with units."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hvdlm.io.terminal import clock, size
from hvdlm_report.axes import short
from hvdlm_report.runs import RunData

_LOSS_UNITS = {
    "language_model": "nats per token",
    "translation": "nats per token",
    "speech": "nats per character",
    "digits": "nats per image",
}


def loss_unit(run: RunData) -> str:
    """Return the unit of a run's losses."""
    return _LOSS_UNITS.get(run.task, "nats")


def six_digits(value: float) -> str:
    """Return a loss or another figure that runs are compared by: 1.38375."""
    return f"{value:,.6g}" if abs(value) < 1e4 else f"{value:,.0f}"


def share(value: float) -> str:
    """Return a fraction of 1 in percent."""
    return f"{100 * value:.3g}%"


def whole(value: float) -> str:
    """Return a count with separators: 808,960."""
    return f"{value:,.0f}"


def ratio(value: float) -> str:
    """Return by what factor compression reduces what is sent: 46.7 to 1."""
    return "none" if 0.995 < value < 1.005 else f"{value:.3g} to 1"


def duration(seconds: float) -> str:
    """Return a duration: 12.3 s, or hours:minutes:seconds."""
    return f"{seconds:.3g} s" if seconds < 60 else f"{clock(min(seconds, 1e12))} {'h' if seconds >= 3600 else 'min'}"


def rate(value: float) -> str:
    """Return tokens per second: 13.5k tokens/s."""
    return f"{float(f'{value:.3g}'):,.6g} tokens/s" if value < 1e5 else f"{short(float(f'{value:.3g}'))} tokens/s"


_FIGURES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "val_loss": ("Validation loss", six_digits),
    "perplexity": ("Perplexity", six_digits),
    "bits_per_byte": ("Bits per byte", six_digits),
    "token_accuracy": ("Token accuracy", share),
    "ema_val_loss": ("Validation loss of averaged weights", six_digits),
    "accuracy": ("Validation accuracy", share),
    "word_error_rate": ("Word error rate", share),
    "bleu": ("BLEU", six_digits),
    "train_loss": ("Last training loss", six_digits),
    "steps": ("Steps", whole),
    "stopped": ("Stopped by", str),
    "skipped_steps": ("Skipped steps", whole),
    "tokens_per_second": ("Throughput", rate),
    "seconds": ("Time of training", duration),
    "data_share": ("Waiting for data", share),
    "device": ("GPU", str),
    "mfu": ("Model FLOPs utilization (MFU)", share),
    "device_memory_peak": ("Peak GPU memory of a rank", size),
    "parameters": ("Parameters", whole),
    "world_size": ("Ranks", whole),
    "framework": ("Framework", str),
    "backend": ("Backend", str),
    "peak_memory_bytes": ("Peak memory of a rank", size),
}
_COMMUNICATION: dict[str, tuple[str, Callable[[Any], str]]] = {
    "bytes_communicated": ("Communicated by a rank", size),
    "compression": ("Compression", ratio),
    "comm_share": ("Waiting for communication", share),
    "overlap": ("Hidden behind computation", share),
    "idle_share": ("Idle time of pipeline stages", share),
}


def rows(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """Return (name, a cell for every run) of the figures; those of communication only where a run communicates."""
    shown = {**_FIGURES, **(_COMMUNICATION if any(run.communicates for run in runs) else {})}
    return [(name, [_cell(run, key, form) for run in runs]) for key, (name, form) in shown.items()]


def _cell(run: RunData, key: str, form: Callable[[Any], str]) -> str:
    value = run.summary.get(key)
    if value is None:
        return ""
    text = form(value)
    return f"{text} {loss_unit(run)}" if key in ("val_loss", "ema_val_loss", "train_loss") else text


def traffic(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """Return a row for each purpose of communication, those with the most bytes first."""
    counters = [run.summary.get("traffic") or {} for run in runs]
    names = dict.fromkeys(name for counter in counters for name in counter)
    largest = {name: max(counter.get(name, {}).get("bytes", 0) for counter in counters) for name in names}
    result = []
    for name in sorted(names, key=lambda name: -largest[name]):
        result.append((name, [_traffic_cell(counter.get(name)) for counter in counters]))
    return result


def _traffic_cell(entry: dict[str, float] | None) -> str:
    if not entry:
        return ""
    calls = entry.get("calls", 0)
    return f"{size(entry.get('bytes', 0))} in {calls:,.0f} calls, {duration(entry.get('seconds', 0))} waited"


def step_seconds(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """Return rows of a step's seconds on the slowest rank, by cause, measured beside predicted."""
    causes = {"seconds": "a step", **{cause: cause for cause in ("compute", "communication", "bubble", "data", "save")}}
    rows = [(name, [_seconds_cell(run, cause) for run in runs]) for cause, name in causes.items()]
    return [*rows, ("error of the prediction", [_error_cell(run) for run in runs])]


def _seconds_cell(run: RunData, cause: str) -> str:
    measured, predicted = (_by_cause(run, name).get(cause) for name in ("measured", "predicted"))
    if measured is None:
        return ""
    return duration(measured) if predicted is None else f"{duration(measured)} (predicted {duration(predicted)})"


def _error_cell(run: RunData) -> str:
    error = (run.summary.get("step_seconds") or {}).get("error")
    return "" if error is None else f"{share(abs(error))} too {'low' if error < 0 else 'high'}"


def _by_cause(run: RunData, name: str) -> dict[str, float]:
    return (run.summary.get("step_seconds") or {}).get(name) or {}


def memory(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """Return a row for each kind of memory: its largest size on any rank, and the largest prediction."""
    kinds = ("parameters", "gradients", "optimizer", "activations")
    return [(kind, [_memory_cell(run, kind) for run in runs]) for kind in kinds]


def _memory_cell(run: RunData, kind: str) -> str:
    ranks = run.summary.get("ranks") or []
    measured, predicted = (
        [(rank.get(name) or {}).get(kind) or 0 for rank in ranks] for name in ("memory", "predicted_memory")
    )
    return f"{size(max(measured))} (predicted {size(max(predicted))})" if any(measured) else ""
