"""Reads what a run's folder says of it, and compares two runs."""

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

_LIMIT = 2**28  # bytes of metrics.jsonl
_SMALL = 2**24

Curve = dict[int, float]
"""{step: value}."""


@dataclass(frozen=True)
class Told:
    """What a run's folder says. ``config``: the leaves of config.yaml by their option's name; ``sample``: its text."""

    name: str
    curves: Mapping[str, Curve]
    summary: Mapping[str, Any]
    config: Mapping[str, str]
    sample: str

    @property
    def losses(self) -> Curve:
        """The losses of the steps that were logged."""
        return self.curves.get("loss", {})


def read(folder: Path) -> Told:
    """Return what ``folder`` says; a run that is still going on has no summary yet.

    Raises:
        HvdlmError: it holds no run, or what it says is damaged.
    """
    if not (folder / "metrics.jsonl").is_file():
        raise HvdlmError(f"{folder}: there is no run (no metrics.jsonl): name the folder given as --log.run.")
    try:
        curves: dict[str, Curve] = {}
        for line in _lines(folder / "metrics.jsonl"):
            for name, value in line.items():
                if name != "step" and type(value) in (int, float) and math.isfinite(value):
                    curves.setdefault(name, {})[line["step"]] = float(value)
        summary = folder / "summary.json"
        told = untrusted_input.read_json(summary, _SMALL, slack=_SMALL) if summary.is_file() else {}
        config = folder / "config.yaml"
        options = (
            safe_yaml.load(str(untrusted_input.read(config, _SMALL), "utf-8"), safe_load) if config.is_file() else {}
        )
        sample = folder / "sample.txt"
        text = str(untrusted_input.read(sample, _SMALL), "utf-8", "replace") if sample.is_file() else ""
        if not isinstance(told, dict) or not isinstance(options, dict):
            raise ValueError("its summary.json or config.yaml is no mapping")
    except (ValueError, OSError) as error:
        raise HvdlmError(
            f"{folder}: what the run says of itself is damaged: {untrusted_input.shown(str(error))}."
        ) from error
    return Told(str(folder), curves, told, dict(leaves(options)), text)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in str(untrusted_input.read(path, _LIMIT), "utf-8", "replace").splitlines():
        try:
            found = untrusted_input.parse_json(line)
        except ValueError:
            continue  # that a run which was killed, or is still writing, left half-written
        if isinstance(found, dict) and type(found.get("step")) is int:
            yield found


def leaves(options: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Yield (option, value) of nested ``options``: ``("model.layers", "4")``."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", json.dumps(value) if isinstance(value, list) else str(value)


@dataclass(frozen=True)
class Comparison:
    """Two curves of losses. ``apart``: the first step on which they differ by more than ``tolerance``, None: none."""

    common: int
    largest: float
    tolerance: float
    apart: int | None
    values: tuple[float, float] | None

    def sentence(self) -> str:
        """Return it in words."""
        if not self.common:
            return "The runs have logged no step in common."
        if self.apart is None or self.values is None:
            return (
                f"Losses agree within {self.tolerance:g} on all {self.common} logged steps that both have; the largest "
                f"difference is {self.largest:.3g}."
            )
        first, second = self.values
        return (
            f"Losses are first more than {self.tolerance:g} apart at step {self.apart}: {first:.6g} and {second:.6g}. "
            f"The largest difference over {self.common} steps is {self.largest:.3g}."
        )


def compare(first: Told, second: Told, tolerance: float) -> Comparison:
    """Return where the losses of two runs part."""
    common = sorted(first.losses.keys() & second.losses.keys())
    apart = [abs(first.losses[step] - second.losses[step]) for step in common]
    at = next((step for step, far in zip(common, apart, strict=True) if far > tolerance), None)
    values = None if at is None else (first.losses[at], second.losses[at])
    return Comparison(len(common), max(apart, default=0.0), tolerance, at, values)
