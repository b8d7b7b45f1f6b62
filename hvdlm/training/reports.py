"""Reports of steps to the step guard, to plugins and, as votes, to the other ranks."""

from __future__ import annotations

import time

from hvdlm.protocols.types import StepResult
from hvdlm.telemetry.rates import is_logged
from hvdlm.training.consensus import Consensus
from hvdlm.training.run import Run
from hvdlm.training.run_control import RunControl
from hvdlm.training.summary import RunTotals, device_memory_peak


class Reports:
    """Reports every step, and votes on it.

    A GPU computes what the host has enqueued. Where a result is pending, its step is reported when the next one has
    been enqueued, so that the GPU doesn't wait for the host; at once if the run does anything else before that. What is
    decided after a step follows from the votes on the step before, so that both ways decide alike.
    """

    def __init__(self, run: Run, totals: RunTotals, consensus: Consensus, control: RunControl) -> None:
        self._run, self._totals, self._consensus, self._control = run, totals, consensus, control
        self._last: tuple[int, int, float, StepResult] | None = None  # the step to vote on, as ``add`` got it
        self._reported = False

    def begin(self) -> None:
        """Note that a step begins; while the one before is not reported, its time lasts."""
        if self._last is None:
            self._began, self._busy = time.perf_counter(), self._run.world.transfer_seconds()

    def add(self, number: int, row: int, learning_rate: float, result: StepResult) -> None:
        """Report the step before, if that is left to do, and this one, unless that can wait. All ranks call."""
        self.report()
        self.vote()
        self._last, self._reported, train = (number, row, learning_rate, result), False, self._run.config.train
        if not result.pending or train.spike or number == train.steps or number in self._control.in_time:
            self.report()

    def report(self) -> None:
        """Report the last step, unless that is done."""
        if self._last is None or self._reported:
            return
        run, (step, _, learning_rate, result), self._reported = self._run, self._last, True
        run.guard.add(result)  # waits for the figures
        began, busy = self._began, self._busy
        self._began, self._busy = time.perf_counter(), run.world.transfer_seconds()
        result.transfer_seconds = None if busy is None or self._busy is None else self._busy - busy
        if is_logged(step, run.config.log.every, result):
            result.device_memory_peak = device_memory_peak(run)
        self._totals.add(result, seconds := self._began - began)
        run.manager.hook.hvdlm_step_ended(
            step=step, result=result, learning_rate=learning_rate, seconds=seconds, rates=self._totals.rates
        )

    def vote(self, undone: bool = False) -> None:
        """Send this rank's votes on the last step if it was reported; not if a rollback has ``undone`` it."""
        if self._last is not None and self._reported:
            if not undone:
                self._consensus.vote(self._last[1], self._run.saver.ready(), self._last[3].bad)
            self._last = None
