"""Entry point of automatic communication (``communication.auto``): measures, decides, watches, decides anew."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.plugins import keras_alone
from hvdlm.protocols.compressor import CompressorMaker
from hvdlm.protocols.group import Group
from hvdlm.protocols.types import StepResult
from hvdlm.protocols.world import World
from hvdlm.training.run_control import RunControl
from hvdlm_auto import checks
from hvdlm_auto.losses import TABLE

if TYPE_CHECKING:
    from hvdlm_auto.controller import Controller


class Automatic:
    """The plugin of one rank; it is made anew for every rank and run."""

    observer = False

    def __init__(self) -> None:
        self._controller: Controller | None = None

    @hookimpl
    def hvdlm_check(self, config: Config, spec: Any) -> None:
        """Refuse combinations of options that automatic communication does not support."""
        checks.check(config)

    @hookimpl(tryfirst=True)
    def hvdlm_make_exchange(
        self, name: str, group: Group, config: Config, compressors: Mapping[str, CompressorMaker], index: int
    ) -> Any:
        """Return the exchange ``all_reduce`` whose method may change; called before the core's own hook."""
        if name != "all_reduce" or not config.communication.auto or len(group.ranks) == 1:
            return None
        with keras_alone():
            modules = importlib.import_module("hvdlm_auto.exchange")
        options = config.communication

        def compressed(algorithm: str, members: Group) -> Any:
            settings = replace(options.compression, algorithm=algorithm, **TABLE[algorithm].options)
            compressor = compressors[algorithm](settings, config.train.seed, index, len(members.ranks))
            return modules.CompressedExchange(members, compressor, replace(options, compression=settings))

        return modules.AutomaticExchange(group, options, compressed)

    @hookimpl(tryfirst=True)
    def hvdlm_run_started(self, config: Config, world: World, info: Mapping[str, Any], run: RunControl) -> None:
        """Measure and decide, or replay the decisions of the checkpoint. All ranks call."""
        if not config.communication.auto or not hasattr(run.opened.exchange, "log"):
            return  # a single rank
        module = importlib.import_module("hvdlm_auto.controller")
        self._controller = module.Controller(run.opened)
        self._controller.begin(resumed=bool(info["start_step"]))

    @hookimpl
    def hvdlm_step_ended(self, step: int, result: StepResult, seconds: float) -> None:
        """Watch the step; at some steps, decide. All ranks call."""
        if self._controller is not None:
            self._controller.step_ended(step, result, seconds)

    @hookimpl
    def hvdlm_rolled_back(self, to_step: int) -> None:
        """Forget the seconds of the steps before."""
        if self._controller is not None:
            self._controller.rolled_back(to_step)

    @hookimpl(tryfirst=True)
    def hvdlm_run_ended(self, summary: dict[str, Any]) -> None:
        """Add the decisions to the summary."""
        if self._controller is not None:
            summary["communication"] = self._controller.summary()
