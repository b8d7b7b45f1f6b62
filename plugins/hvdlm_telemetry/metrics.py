"""Writes ``RUN/metrics.jsonl``, a JSON object per logged step and per evaluation, and ``RUN/summary.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.errors import RankError
from hvdlm.io import safe_files, untrusted_input
from hvdlm.io.atomic_files import replace
from hvdlm.protocols.types import StepResult
from hvdlm.protocols.world import World
from hvdlm.telemetry.rates import Rates, is_logged
from hvdlm_telemetry.append_file import AppendFile


class Metrics:
    """Event plugin that writes figures for other programs.

    A full disk ends no run, but a run whose figures are still missing at its end has failed.
    """

    observer = True

    def __init__(self, config: Config) -> None:
        self._folder = Path(config.log.run)
        self._every = config.log.every
        self._path = self._folder / "metrics.jsonl"
        self._active = False
        self._first_step = 0  # after which the file that is opened next continues
        self._file: AppendFile | None = None
        self._lost: OSError | None = None  # why lines are missing that won't be written any more
        self._rates: Rates | None = None  # after the last step
        self._logged: Rates | None = None  # at the last line

    @hookimpl
    def hvdlm_run_started(self, config: Config, world: World, info: Mapping[str, Any]) -> None:
        """Open the file; keep the lines of an earlier run up to the step that is resumed."""
        self._active = world.rank == 0
        if self._active:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._first_step = int(info["start_step"])
            self._open()

    @hookimpl
    def hvdlm_step_ended(self, step: int, result: StepResult, learning_rate: float, rates: Rates) -> None:
        """Write the step where it is due; rates, seconds and bytes are means over the steps since the last line.

        A step whose update was skipped is always written, with ``skipped``.
        """
        self._rates = rates
        if self._active and is_logged(step, self._every, result):
            since, self._logged = rates.since(self._logged), rates
            self._write(step=step, **since.figures(result, learning_rate))

    @hookimpl
    def hvdlm_evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the evaluation."""
        if self._active:
            self._write(step=step, **metrics)

    @hookimpl
    def hvdlm_rolled_back(self, step: int, to_step: int, batches: Sequence[int]) -> None:
        """Drop the lines after the checkpoint's step, and write a line about the rollback."""
        if self._active:
            self._first_step = to_step
            self._close()
            self._logged = self._rates
            self._write(step=to_step, rolled_back_from=step, batches_left_out=list(batches))

    @hookimpl(trylast=True)
    def hvdlm_run_ended(self, summary: Mapping[str, Any]) -> None:
        """Write the summary and close, after all other plugins.

        Raises:
            RankError: figures could not be written.
        """
        if not self._active:
            return
        self._active = False
        self._close()
        try:
            replace(self._folder / "summary.json", json.dumps(_finite(summary), indent=1) + "\n")
        except OSError as error:
            raise RankError(f"{self._folder / 'summary.json'} could not be written: {error.strerror}.") from error
        if self._lost:
            raise RankError(f"{self._path} lacks lines that could not be written: {self._lost.strerror}.")

    def _open(self) -> AppendFile:
        _keep_until(self._path, self._first_step)
        self._file = AppendFile(self._path)
        return self._file

    def _close(self) -> None:
        try:
            if self._file is not None:
                self._file.close()
        except OSError as error:
            self._lost = error
        self._file = None

    def _write(self, **values: Any) -> None:
        line = (json.dumps(_finite(values)) + "\n").encode()
        try:
            file = self._file or self._open()
        except OSError as error:
            self._lost = error
            raise
        file.write(line)


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with None in place of NaN and infinity, which JSON lacks."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _keep_until(path: Path, step: int) -> None:
    """Keep the lines of ``path`` up to ``step``, without incomplete ones of a killed run."""
    if safe_files.kind(path) != "file":
        safe_files.delete_file(path)  # a link: nothing is read or written through it
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        kept = [line.rstrip("\n") for line in file if _is_until(line, step)]
    replace(path, "".join(f"{line}\n" for line in kept))


def _is_until(line: str, step: int) -> bool:
    try:
        return bool(untrusted_input.parse_json(line)["step"] <= step)
    except (ValueError, KeyError, TypeError):
        return False
