"""Reads the metrics, summary and configuration in a run's folder, and compares the losses of two runs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yaml import safe_load

from hvdlm.errors import HvdlmError
from hvdlm.io import safe_yaml, untrusted_input
from hvdlm.io.user_folders import similar_run

_METRICS_BYTES = 2**28  # largest metrics.jsonl that is read
_FILE_BYTES = 2**24  # largest of the other files

Curve = dict[int, float]
"""{step: value}."""


@dataclass(frozen=True)
class RunData:
    """A run's curves, summary, configuration (values by option name) and sample text; ``name`` is its folder."""

    name: str
    curves: Mapping[str, Curve]
    summary: Mapping[str, Any]
    config: Mapping[str, str]
    sample: str

    @property
    def losses(self) -> Curve:
        """The training loss at each logged step."""
        return self.curves.get("loss", {})


def read(folder: Path) -> RunData:
    """Return the data in a run's folder; a run that hasn't ended has no summary yet.

    Raises:
        HvdlmError: it holds no run, or a file is damaged.
    """
    if not (folder / "metrics.jsonl").is_file():
        advice = f"name the folder given as --log.run.{similar_run(folder)}"
        raise HvdlmError(f"{folder}: there is no run (no metrics.jsonl): {advice}")
    try:
        curves: dict[str, Curve] = {}
        for line in _lines(folder / "metrics.jsonl"):
            for name, value in line.items():
                if name != "step" and type(value) in (int, float) and math.isfinite(value):
                    curves.setdefault(name, {})[line["step"]] = float(value)
        path = folder / "summary.json"
        summary = untrusted_input.read_json(path, _FILE_BYTES, slack=_FILE_BYTES) if path.is_file() else {}
        path = folder / "config.yaml"
        options = (
            safe_yaml.load(str(untrusted_input.read(path, _FILE_BYTES), "utf-8"), safe_load) if path.is_file() else {}
        )
        path = folder / "sample.txt"
        sample = str(untrusted_input.read(path, _FILE_BYTES), "utf-8", "replace") if path.is_file() else ""
        if not isinstance(summary, dict) or not isinstance(options, dict):
            raise ValueError("its summary.json or config.yaml is no mapping")
    except (ValueError, OSError) as error:
        raise HvdlmError(f"{folder}: a file of this run is damaged: {untrusted_input.shown(str(error))}.") from error
    return RunData(str(folder), curves, summary, dict(leaves(options)), sample)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in str(untrusted_input.read(path, _METRICS_BYTES), "utf-8", "replace").splitlines():
        try:
            record = untrusted_input.parse_json(line)
        except ValueError:
            continue  # half-written, by a run that was killed or is still writing
        if isinstance(record, dict) and type(record.get("step")) is int:
            yield record


def leaves(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield each option of nested sections with its full name and its value as text: ``("model.layers", "4")``."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(value) if isinstance(value, list) else str(value)


@dataclass(frozen=True)
class Comparison:
    """The losses of two runs, compared at the steps that both have logged.

    Attributes:
        steps: how many these are.
        largest: the largest difference at any of them.
        tolerance: difference above which the runs have diverged.
        diverged_at: the first step at which they have, None if there is none.
        values: the two losses at that step.
    """

    steps: int
    largest: float
    tolerance: float
    diverged_at: int | None
    values: tuple[float, float] | None

    def sentence(self) -> str:
        """Return the result as one or two sentences."""
        if not self.steps:
            return "The runs have logged no step in common."
        if self.diverged_at is None or self.values is None:
            return (
                f"Losses agree within {self.tolerance:g} on all {self.steps} logged steps that both have; the largest "
                f"difference is {self.largest:.3g}."
            )
        first, second = self.values
        return (
            f"Losses are first more than {self.tolerance:g} apart at step {self.diverged_at}: {first:.6g} and "
            f"{second:.6g}. The largest difference over {self.steps} steps is {self.largest:.3g}."
        )


def compare(first: RunData, second: RunData, tolerance: float) -> Comparison:
    """Compare the losses of two runs at the steps that both have logged."""
    steps = sorted(first.losses.keys() & second.losses.keys())
    differences = [abs(first.losses[step] - second.losses[step]) for step in steps]
    at = next((step for step, size in zip(steps, differences, strict=True) if size > tolerance), None)
    values = None if at is None else (first.losses[at], second.losses[at])
    return Comparison(len(steps), max(differences, default=0.0), tolerance, at, values)
