"""Reads the metrics, summary and configuration in a run's folder; all of it is untrusted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from yaml import safe_load

from hvdlm.errors import HvdlmError
from hvdlm.io import safe_yaml, untrusted_input
from hvdlm.io.terminal import printable
from hvdlm.io.user_folders import similar_run
from hvdlm.io.value_checks import count, fields, list_of, mapping_of, number, or_null, text

CURVES = ("loss", "val_loss", "learning_rate", "tokens_per_second", "grad_norm", "comm_share", "comm_bytes")
"""The figures of metrics.jsonl that are read."""

_METRICS_BYTES = 2**28  # largest metrics.jsonl that is read
_SUMMARY_BYTES, _CONFIG_BYTES, _SAMPLE_BYTES = 2**24, 2**18, 2**20
LARGEST = 1e100  # figures beyond it are left out: no run has any, and differences of them would overflow

_TRAFFIC = fields({}, dict.fromkeys(("calls", "bytes", "seconds"), number(0)))
_FIGURE = or_null(number(finite=False))
_BYTES = mapping_of(or_null(number()))
_CAUSES = or_null(mapping_of(or_null(number())))
_SUMMARY = fields(
    {},
    {
        **dict.fromkeys(("val_loss", "perplexity", "bits_per_byte", "train_loss", "tokens_per_second"), _FIGURE),
        **dict.fromkeys(("seconds", "compression", "comm_share", "overlap", "idle_share"), _FIGURE),
        **dict.fromkeys(("token_accuracy", "ema_val_loss"), _FIGURE),
        **dict.fromkeys(("accuracy", "word_error_rate", "bleu", "data_share", "mfu"), _FIGURE),
        **dict.fromkeys(("steps", "skipped_steps", "parameters", "world_size"), or_null(count())),
        **dict.fromkeys(("bytes_communicated", "peak_memory_bytes", "device_memory_peak"), or_null(number(0))),
        **dict.fromkeys(("stopped", "framework", "backend", "device"), or_null(text)),
        "versions": mapping_of(text),
        "traffic": mapping_of(_TRAFFIC),
        "step_seconds": or_null(fields({}, {"measured": _CAUSES, "predicted": _CAUSES, "error": _FIGURE})),
        "ranks": list_of(
            fields({}, {"memory": or_null(_BYTES), "predicted_memory": or_null(_BYTES), "step_bytes": or_null(_BYTES)})
        ),
    },
)

Curve = dict[int, float]
"""{step: value}."""
Value = TypeVar("Value")


@dataclass(frozen=True)
class RunData:
    """A run as its folder describes it.

    Attributes:
        name: its folder.
        curves: its figures of ``CURVES`` by name.
        summary: the content of summary.json, empty while it isn't finished.
        config: values by option name.
        sample: the text that it generated at its end.
    """

    name: str
    curves: Mapping[str, Curve]
    summary: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, str] = field(default_factory=dict)
    sample: str = ""

    @property
    def losses(self) -> Curve:
        """The training loss at each logged step."""
        return self.curves.get("loss", {})

    @property
    def task(self) -> str:
        """The name of the task."""
        return self.config.get("task", "language_model")

    @property
    def communicates(self) -> bool:
        """Whether there is anything to show of communication."""
        return any(self.curves.get("comm_bytes", {}).values()) or (self.summary.get("world_size") or 1) > 1

    @property
    def tokens_per_step(self) -> int | None:
        """Tokens of a global batch; None where the configuration doesn't tell."""
        sizes = [self.config.get(name, "") for name in ("train.batch_size", "data.context")]
        if self.task != "language_model" or not all(
            size.isascii() and size.isdigit() and len(size) < 10 for size in sizes
        ):
            return None
        return int(sizes[0]) * int(sizes[1]) or None


def read(folder: Path) -> RunData:
    """Return the data in a run's folder; a run that hasn't ended has no summary yet.

    Raises:
        HvdlmError: it holds no run, or a file is damaged.
    """
    if not (folder / "metrics.jsonl").is_file():
        advice = f"name the folder given as --log.run.{similar_run(folder)}"
        raise HvdlmError(f"{folder}: there is no run (no metrics.jsonl): {advice}")
    return RunData(
        printable(folder),
        _read(folder / "metrics.jsonl", _curves) or {},
        _read(folder / "summary.json", _summary) or {},
        _read(folder / "config.yaml", _options) or {},
        _read(folder / "sample.txt", _sample) or "",
    )


def _read(path: Path, reader: Callable[[Path], Value]) -> Value | None:
    """Return what ``reader`` reads from ``path``; None where there is no such file."""
    if not path.is_file():
        return None
    try:
        return reader(path)
    except (ValueError, OSError) as error:
        reason = untrusted_input.shown(str(error), 200)
        raise HvdlmError(f"{path.parent}: a file of this run is damaged: {path.name}: {reason}.") from error


def _curves(path: Path) -> dict[str, Curve]:
    if untrusted_input.size(path) > _METRICS_BYTES:
        raise ValueError(f"it is larger than {_METRICS_BYTES:,} bytes")
    curves: dict[str, Curve] = {}
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            for name, step, value in _figures(line):
                curves.setdefault(name, {})[step] = value
    return {name: dict(sorted(curve.items())) for name, curve in curves.items()}


def _figures(line: str) -> Iterator[tuple[str, int, float]]:
    """Yield (name, step, value) of the figures in a line; nothing of one that is damaged or half-written."""
    try:
        record = untrusted_input.parse_json(line)
        step = record["step"]
        count()(step, "step")
    except (ValueError, TypeError, KeyError):
        return
    for name in CURVES:
        value = record.get(name)
        if type(value) in (int, float) and abs(value) < LARGEST:
            yield name, step, float(value)


def _summary(path: Path) -> dict[str, Any]:
    summary = untrusted_input.read_json(path, _SUMMARY_BYTES, slack=_SUMMARY_BYTES)
    _SUMMARY(summary, "")
    return dict(summary)


def _options(path: Path) -> dict[str, str]:
    options = safe_yaml.load(str(untrusted_input.read(path, _CONFIG_BYTES), "utf-8"), safe_load)
    mapping_of()(options, "content")
    return dict(leaves(options))


def _sample(path: Path) -> str:
    return printable(str(untrusted_input.read(path, _SAMPLE_BYTES), "utf-8", "replace"))


def leaves(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield each option of nested sections with its full name and its value as text: ``("model.layers", "4")``."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(value) if isinstance(value, list) else str(value)
