"""Base class of trackers: which metrics are logged when, and to which run. Only rank 0 logs."""

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
from hvdlm.io import untrusted_input
from hvdlm.io.atomic_files import replace
from hvdlm.io.value_checks import Check, mapping_of
from hvdlm.models.spec import ModelSpec
from hvdlm.protocols.types import StepResult
from hvdlm.protocols.world import World
from hvdlm.telemetry.rates import Rates, is_logged
from hvdlm_trackers.sender import Sender

Metrics = dict[str, float]
_MOST_BYTES = 2**16  # of RUN/NAME.json


class Tracker(ABC):
    """An event plugin that logs the run to a tracker's library; ``name`` is also its section of options.

    A tracker implements ``begin``, ``log`` and ``end``, which run one after the other in a separate thread and may
    fail. ``package`` is the distribution to install; it contains the module ``name``. ``kept`` checks what ``keep``
    saved before it is used again.
    """

    name: str
    package: str
    kept: Check = staticmethod(mapping_of())
    observer = True

    def __init__(self) -> None:
        self._sender: Sender | None = None
        self._begun = False
        self._logged: Rates | None = None  # at the last step that was logged

    @hookimpl
    def hvdlm_check(self, config: Config, spec: ModelSpec) -> None:
        """Raise HvdlmError if the tracker's package isn't installed."""
        if not installed(self.name):
            raise HvdlmError(
                f"plugins: {self.name} needs a package that is not installed: pip install {self.package}, or remove "
                f"{self.name} from --plugins."
            )
        if not config.plugin_options[self.name].wait >= 0:
            raise HvdlmError(f"{self.name}.wait is below 0, expected seconds: set --{self.name}.wait.")

    @hookimpl
    def hvdlm_run_started(self, config: Config, world: World, info: Mapping[str, Any]) -> None:
        """Start a run in the tracker, or continue the tracker's run if this one is resumed."""
        if world.rank != 0:
            return
        self.config = config
        self.options = config.plugin_options[self.name]
        self.info = {**info, "world_size": world.size}
        self._file = Path(config.log.run).resolve() / f"{self.name}.json"
        self._sender = Sender(self.name)
        self._send(lambda: None)

    @hookimpl
    def hvdlm_step_ended(self, step: int, result: StepResult, learning_rate: float, rates: Rates) -> None:
        """Log the same metrics at the same steps as metrics.jsonl."""
        if self._sender is not None and is_logged(step, self.config.log.every, result):
            self._log(step, rates.since(self._logged).figures(result, learning_rate))
            self._logged = rates

    @hookimpl
    def hvdlm_evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log an evaluation's metrics."""
        self._log(step, metrics)

    @hookimpl
    def hvdlm_rolled_back(self, step: int, to_step: int, batches: Sequence[int]) -> None:
        """Log that the run was rolled back: the following steps are logged again."""
        self._log(to_step, {"rolled_back_from": step})

    @hookimpl
    def hvdlm_run_ended(self, summary: Mapping[str, Any]) -> None:
        """Log the summary and how the run ended, and wait until everything is sent."""
        if self._sender is not None:
            self._send(lambda: self.end(summary))
            self._sender.close(self.options.wait)
            self._sender = None

    def _log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        present = {name: float(value) for name, value in metrics.items() if value is not None}
        if self._sender is not None:
            self._send(lambda: self.log(step, present))

    def _send(self, action: Any) -> None:
        """Queue ``action``; the run is started first, again with every action as long as that fails."""

        def act() -> None:
            if not self._begun:
                self.begin()
                self._begun = True
            action()

        assert self._sender is not None
        self._sender.send(act)

    def earlier(self) -> dict[str, Any]:
        """Return what ``keep`` saved when the resumed run was started; {} if none is resumed."""
        if self.config.checkpoint.resume == "none":
            return {}
        try:
            saved = untrusted_input.read_json(self._file, _MOST_BYTES)
            self.kept(saved, "")
        except (OSError, ValueError):
            return {}
        return dict(saved)

    def keep(self, **values: Any) -> None:
        """Save in RUN/NAME.json what identifies the tracker's run, to resume it."""
        replace(self._file, json.dumps(values, indent=1) + "\n")

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self._file.parent

    @abstractmethod
    def begin(self) -> None:
        """Start a run, or continue the ``earlier`` one; log ``config`` and ``info``."""

    @abstractmethod
    def log(self, step: int, metrics: Metrics) -> None:
        """Log the metrics of a step."""

    @abstractmethod
    def end(self, summary: Mapping[str, Any]) -> None:
        """Log the summary, and whether the run is finished or was stopped and can be resumed."""


def installed(module: str) -> bool:
    """Return whether a package is installed, without importing it; a mere folder of that name doesn't count."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def numbers(summary: Mapping[str, Any]) -> Metrics:
    """Return the numbers in a summary as metrics ``summary/NAME``."""
    return {
        f"summary/{name}": float(value)
        for name, value in summary.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
