"""Writes traces of some steps (``log.profile``) into ``RUN/profile``: what ran when, on the CPU and on GPUs.

A file for every rank, in the format of Chrome's trace viewer, which https://ui.perfetto.dev opens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.diagnostics.phases import READING, process
from hvdlm.errors import HvdlmError
from hvdlm.io.atomic_files import replace
from hvdlm.io.untrusted_input import shown
from hvdlm.models.spec import ModelSpec
from hvdlm.protocols.task import Task
from hvdlm.protocols.world import World
from hvdlm.training.run_control import RunControl

_RANGE = re.compile(r"(\d{1,9}):(\d{1,9})", re.ASCII)
_MOST = 100  # steps of a trace, which is kept in memory: some MB for each


class Trace(Protocol):
    """What a framework is recording."""

    def stop(self) -> str:
        """End the recording; return it as JSON for Chrome's trace viewer.

        Its ranges ``forward``, ``backward``, ``exchange``, ``update`` are events of the category ``user_annotation``.
        """


@runtime_checkable
class HasTraces(Protocol):
    """A Trainable whose framework records traces."""

    def start_trace(self) -> Trace:
        """Start to record what this process computes, one trace at a time."""


def steps_of(config: Config) -> tuple[int, int]:
    """Return the first and the last step of ``log.profile``; 0 and 0: there is none.

    Raises:
        HvdlmError: it is no range of steps of this run.
    """
    if config.log.profile is None:
        return 0, 0
    text, steps = config.log.profile, config.train.steps
    match = _RANGE.fullmatch(text)
    first, last = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= first <= last <= steps or last - first >= _MOST:
        raise HvdlmError(
            f"log.profile {shown(repr(text), 40)}: expected FIRST:LAST, at most {_MOST} steps from 1 to train.steps "
            f"{steps}, for example --log.profile {min(10, steps)}:{min(13, steps)}."
        )
    return first, last


class Profile:
    """Event plugin that has the framework record the steps, and writes the trace of this rank."""

    observer = True

    def __init__(self) -> None:
        self._trace: Trace | None = None
        self._first = 0  # of the trace that is recorded
        self._range = (0, 0)

    @hookimpl
    def hvdlm_check(self, config: Config, spec: ModelSpec) -> None:
        """Check the range of steps, where their number is known before the data is open."""
        if config.train.tokens is None and config.train.epochs is None:
            steps_of(config)

    @hookimpl
    def hvdlm_check_data(self, config: Config, task: Task) -> None:
        """Check the range of steps."""
        steps_of(config)

    @hookimpl
    def hvdlm_run_started(self, config: Config, world: World, info: Mapping[str, Any], run: RunControl) -> None:
        """Start the trace where the range begins with the run's first step, or before it."""
        if config.log.profile is None:
            return
        trainable = run.opened.trainable
        if not isinstance(trainable, HasTraces):
            raise HvdlmError(f"log.profile: framework {config.framework} records no traces: leave --log.profile out.")
        self._range = first, last = steps_of(config)
        run.in_time |= {first - 1, last}  # so that the trace has these steps, on GPUs too
        self._rank = world.rank
        self._folder = Path(config.log.run) / "profile"
        self._trainable = trainable
        run.opened.closing.callback(self._stop)
        self._start(info["start_step"] + 1)

    # After all other plugins, so that the trace has whole steps.
    @hookimpl(trylast=True)
    def hvdlm_step_ended(self, step: int) -> None:
        """Write the trace after its last step, or start it before the first."""
        if self._trace is None:
            self._start(step + 1)
        elif step >= self._range[1]:
            self._write(step)

    @hookimpl
    def hvdlm_rolled_back(self, step: int, to_step: int) -> None:
        """Write the steps up to the rollback; the steps that follow it are traced anew."""
        self._write(step)
        self._start(to_step + 1)

    @hookimpl
    def hvdlm_run_ended(self, summary: Mapping[str, Any]) -> None:
        """Write the steps so far where the run ends within the range."""
        self._write(summary["steps"])

    def _start(self, step: int) -> None:
        """Start the trace if the range has ``step``."""
        if self._range[0] <= step <= self._range[1]:
            with process.during("starting a trace"):
                self._trace, self._first = self._trainable.start_trace(), step

    def _stop(self) -> str | None:
        trace, self._trace = self._trace, None
        return trace.stop() if trace else None

    def _write(self, last: int) -> None:
        if self._trace is not None:
            with process.during("writing the trace of its steps", patience=READING):
                self._folder.mkdir(parents=True, exist_ok=True)
                name = f"steps-{self._first}-{last}-rank-{self._rank}.json"
                replace(self._folder / name, self._stop() or "")
