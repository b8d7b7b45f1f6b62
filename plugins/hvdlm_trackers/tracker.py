"""What the trackers have in common: which figures are told when, and which run they belong to. Rank 0 tells."""

from __future__ import annotations

import importlib.util
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.io.atomic_files import replace
from hvdlm.models.spec import ModelSpec
from hvdlm.protocols.types import StepResult
from hvdlm.protocols.world import World
from hvdlm.telemetry.rates import Interval, logged
from hvdlm_trackers.sender import Sender

Figures = dict[str, float]


class Tracker(ABC):
    """An event plugin that tells a tracker's library of the run; ``name`` is its section of options as well.

    A tracker implements ``begin``, ``log`` and ``end``: they run in a thread of their own, one after the other, and may
    fail. ``package`` is what has to be installed, and brings the module ``name``.
    """

    name: str
    package: str

    def __init__(self) -> None:
        self._sender: Sender | None = None
        self._begun = False

    @hookimpl
    def hvdlm_check(self, config: Config, spec: ModelSpec) -> None:
        """Refuse a tracker that isn't installed."""
        if not installed(self.name):
            raise HvdlmError(
                f"plugins: {self.name} needs a package that is not installed: pip install {self.package}, or leave "
                f"{self.name} out of --plugins."
            )
        if not config.plugin_options[self.name].wait >= 0:
            raise HvdlmError(f"{self.name}.wait is below 0, expected seconds: set --{self.name}.wait.")

    @hookimpl
    def hvdlm_run_started(self, config: Config, world: World, info: Mapping[str, Any]) -> None:
        """Begin a run in the tracker, or go on with that of the run that is resumed."""
        if world.rank != 0:
            return
        self.config, self.options = config, config.plugin_options[self.name]
        self.info = {**info, "world_size": world.size}
        self._file = Path(config.log.run).resolve() / f"{self.name}.json"
        self._interval = Interval(info["parameters"])
        self._sender = Sender(self.name)
        self._send(lambda: None)

    @hookimpl
    def hvdlm_step_ended(self, step: int, result: StepResult, learning_rate: float, seconds: float) -> None:
        """Log the steps that metrics.jsonl holds, with the same figures."""
        if self._sender is None:
            return
        self._interval.add(result, seconds)
        if logged(step, self.config.log.every, result):
            self._log(step, self._interval.figures(result, learning_rate))
            self._interval.forget()

    @hookimpl
    def hvdlm_evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the evaluation."""
        self._log(step, metrics)

    @hookimpl
    def hvdlm_rolled_back(self, step: int, to_step: int, batches: Sequence[int]) -> None:
        """Log that the run went back: what follows tells of the same steps again."""
        self._log(to_step, {"rolled_back_from": step})

    @hookimpl
    def hvdlm_run_ended(self, summary: Mapping[str, Any]) -> None:
        """Log the summary and how the run ended, and wait for what is still to be sent."""
        if self._sender is not None:
            self._send(lambda: self.end(summary))
            self._sender.close(self.options.wait)
            self._sender = None

    def _log(self, step: int, figures: Mapping[str, float | None]) -> None:
        known = {name: float(value) for name, value in figures.items() if value is not None}
        if self._sender is not None:
            self._send(lambda: self.log(step, known))

    def _send(self, action: Any) -> None:
        """Have ``action`` done in a run that has begun; one that could not begin is tried again at every action."""

        def act() -> None:
            if not self._begun:
                self.begin()
                self._begun = True
            action()

        assert self._sender is not None
        self._sender.send(act)

    def earlier(self) -> dict[str, Any]:
        """Return what ``keep`` kept of the run that is resumed; empty where none is."""
        if self.config.checkpoint.resume == "none":
            return {}
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def keep(self, **values: Any) -> None:
        """Keep in RUN/NAME.json what finds the tracker's run again."""
        replace(self._file, json.dumps(values, indent=1) + "\n")

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self._file.parent

    @abstractmethod
    def begin(self) -> None:
        """Begin a run, or go on with the ``earlier`` one; tell of ``config`` and ``info``."""

    @abstractmethod
    def log(self, step: int, figures: Figures) -> None:
        """Tell figures of a step."""

    @abstractmethod
    def end(self, summary: Mapping[str, Any]) -> None:
        """Tell the summary, and whether the run is finished or was stopped to be gone on with."""


def installed(module: str) -> bool:
    """Return whether a package is installed, without importing it; a folder of its name is none."""
    found = importlib.util.find_spec(module)
    return found is not None and found.origin is not None


def numbers(summary: Mapping[str, Any]) -> Figures:
    """Return the figures of a summary as ``summary/NAME``."""
    return {
        f"summary/{name}": float(value)
        for name, value in summary.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
