"""Writes ``RUN/metrics.jsonl``, a JSON object per logged step and per evaluation, and ``RUN/summary.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.io import untrusted_input
from hvdlm.io.atomic_files import replace
from hvdlm.protocols.types import StepResult
from hvdlm.protocols.world import World
from hvdlm.telemetry.rates import Rates, is_logged


class Metrics:
    """Event plugin that writes figures for other programs."""

    def __init__(self, config: Config) -> None:
        self._folder = Path(config.log.run)
        self._every = config.log.every
        self._path = self._folder / "metrics.jsonl"
        self._file: TextIO | None = None
        self._rates: Rates | None = None  # after the last step
        self._logged: Rates | None = None  # at the last line

    @hookimpl
    def hvdlm_run_started(self, config: Config, world: World, info: Mapping[str, Any]) -> None:
        """Open the file; keep the lines of an earlier run up to the step that is resumed."""
        if world.rank == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            _keep_until(self._path, int(info["start_step"]))
            self._file = self._path.open("a", encoding="utf-8")

    @hookimpl
    def hvdlm_step_ended(self, step: int, result: StepResult, learning_rate: float, rates: Rates) -> None:
        """Write the step where it is due; rates, seconds and bytes are means over the steps since the last line.

        A step whose update was skipped is always written, with ``skipped``.
        """
        self._rates = rates
        if self._file and is_logged(step, self._every, result):
            self._write(step=step, **rates.since(self._logged).figures(result, learning_rate))
            self._logged = rates

    @hookimpl
    def hvdlm_evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the evaluation."""
        if self._file:
            self._write(step=step, **metrics)

    @hookimpl
    def hvdlm_rolled_back(self, step: int, to_step: int, batches: Sequence[int]) -> None:
        """Drop the lines after the checkpoint's step, and write a line about the rollback."""
        if self._file:
            self._file.close()
            _keep_until(self._path, to_step)
            self._file = self._path.open("a", encoding="utf-8")
            self._logged = self._rates
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
    """Return values with None in place of NaN and infinity, which JSON lacks."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _keep_until(path: Path, step: int) -> None:
    """Keep the lines of ``path`` up to ``step``, without incomplete ones of a killed run."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        kept = [line.rstrip("\n") for line in file if _is_until(line, step)]
    replace(path, "".join(f"{line}\n" for line in kept))


def _is_until(line: str, step: int) -> bool:
    try:
        return bool(untrusted_input.parse_json(line)["step"] <= step)
    except (ValueError, KeyError, TypeError):
        return False
