"""Reports of steps to the step guard, to plugins and, as votes, to the other ranks."""

from __future__ import annotations

import time
from typing import NamedTuple

from hvdlm.protocols.types import StepResult
from hvdlm.telemetry.rates import is_logged
from hvdlm.training.consensus import Consensus
from hvdlm.training.run import Run
from hvdlm.training.run_control import RunControl
from hvdlm.training.summary import RunTotals, device_memory_peak


class _Step(NamedTuple):
    number: int  # from 1
    row: int  # the first of its batch
    learning_rate: float
    result: StepResult


class Reports:
    """Reports every step, and votes on it.

    A GPU computes what the host has enqueued. Where a result is pending, its step is reported when the next one has
    been enqueued, so that the GPU doesn't wait for the host; at once if the run does anything else before that. What is
    decided after a step follows from the votes on the step before, so that both ways decide alike.
    """

    def __init__(self, run: Run, totals: RunTotals, consensus: Consensus, control: RunControl) -> None:
        self._run = run
        self._totals = totals
        self._consensus = consensus
        self._control = control
        self._last: _Step | None = None  # the step to vote on
        self._reported = False
        self._began = 0.0
        self._busy: float | None = None

    def begin(self) -> None:
        """Note that a step begins; while the one before is not reported, its time lasts."""
        if self._last is None:
            self._began, self._busy = time.perf_counter(), self._run.world.transfer_seconds()

    def add(self, number: int, row: int, learning_rate: float, result: StepResult) -> None:
        """Report the step before, if that is left to do, and this one, unless that can wait. All ranks call."""
        self.report()
        self.vote()
        self._last, self._reported = _Step(number, row, learning_rate, result), False
        train = self._run.config.train
        if not result.pending or train.spike or number == train.steps or self._control.in_time(number):
            self.report()

    def report(self) -> None:
        """Report the last step, unless that is done."""
        if self._last is None or self._reported:
            return
        run, (step, _, learning_rate, result), self._reported = self._run, self._last, True
        run.guard.add(result)  # waits for the figures
        began, busy = self._began, self._busy
        self._began, self._busy = time.perf_counter(), run.world.transfer_seconds()
        if busy is not None:
            result.transfer_seconds = self._busy - busy  # type: ignore[operator]
        if is_logged(step, run.config.log.every, result):
            result.device_memory_peak = device_memory_peak(run)
        seconds = self._began - began
        self._totals.add(result, seconds)
        run.manager.hook.hvdlm_step_ended(
            step=step, result=result, learning_rate=learning_rate, seconds=seconds, rates=self._totals.rates
        )

    def vote(self) -> None:
        """Send this rank's votes on the last step, if it has been reported. All ranks call."""
        if self._last is not None and self._reported:
            self._consensus.vote(self._last.row, self._run.saver.ready(), self._last.result.skipped)
            self._last = None

    def forget(self) -> None:
        """Drop the last step, which a rollback has undone."""
        self._last = None
