"""``RUN/metrics.jsonl``, one JSON object per logged step and per evaluation, and ``RUN/summary.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.io.atomic_files import replace
from hvdlm.protocols.types import StepResult
from hvdlm.protocols.world import World
from hvdlm.telemetry.rates import Interval, logged


class Metrics:
    """Writes the files that other programs read."""

    def __init__(self, config: Config) -> None:
        self._folder, self._every = Path(config.log.run), config.log.every
        self._path = self._folder / "metrics.jsonl"
        self._file: TextIO | None = None
        self._interval = Interval(0)

    @hookimpl
    def hvdlm_run_started(self, config: Config, world: World, info: Mapping[str, Any]) -> None:
        """Open the file; of an earlier run, keep what lies before the step that is resumed."""
        if world.rank == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._interval = Interval(info["parameters"])
            _keep_until(self._path, int(info["start_step"]))
            self._file = self._path.open("a", encoding="utf-8")

    @hookimpl
    def hvdlm_step_ended(self, step: int, result: StepResult, learning_rate: float, seconds: float) -> None:
        """Write the step where it is due; rates, seconds and bytes are means over the steps since the last line.

        A step whose update was left out is always written, with ``skipped``.
        """
        self._interval.add(result, seconds)
        if self._file and logged(step, self._every, result):
            self._write(step=step, **self._interval.figures(result, learning_rate))
            self._interval.forget()

    @hookimpl
    def hvdlm_evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the evaluation."""
        if self._file:
            self._write(step=step, **metrics)

    @hookimpl
    def hvdlm_rolled_back(self, step: int, to_step: int, batches: Sequence[int]) -> None:
        """Drop what lies behind the checkpoint, and write that it was so."""
        if self._file:
            self._file.close()
            _keep_until(self._path, to_step)
            self._file = self._path.open("a", encoding="utf-8")
            self._interval.forget()
            self._write(step=to_step, rolled_back_from=step, batches_left_out=list(batches))

    @hookimpl
    def hvdlm_run_ended(self, summary: Mapping[str, Any]) -> None:
        """Write the summary and close."""
        if self._file:
            self._file.close()
            self._file = None
            replace(self._folder / "summary.json", json.dumps(_finite(summary), indent=1) + "\n")

    def _write(self, **values: Any) -> None:
        assert self._file is not None
        self._file.write(json.dumps(_finite(values)) + "\n")
        self._file.flush()


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with null for what JSON can't write (not a number, infinite)."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _keep_until(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # a line that a killed run left half-written
    replace(path, "".join(kept))
