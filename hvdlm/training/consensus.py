"""Consensus of all ranks between steps: on signals, time limits, skipped updates, finished saves, plugins' requests.

Every rank sends its votes at the end of a step and receives the sum of all ranks' votes at the end of the next one,
so that the exchange costs no waiting. Decisions follow from the received sums alone, so all ranks decide alike, at the
same step.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from hvdlm.diagnostics.abort import another_rank_failed
from hvdlm.protocols.group import Handle
from hvdlm.protocols.world import World
from hvdlm.training.run_control import RunControl
from hvdlm.training.signals import Signals


class Votes(NamedTuple):
    """The sums over ranks of the votes of the step before.

    Attributes:
        row: the first row of that step's batch; None: there are no votes yet.
        signalled, late, ready, skipped: the number of ranks that received a signal, reached the time limit, finished
            their phase of the save in progress, skipped the update.
        finish, save, evaluate: the number of ranks whose plugins ask to stop in good order, to save, to evaluate.
    """

    row: int | None = None
    signalled: int = 0
    late: int = 0
    ready: int = 0
    skipped: int = 0
    finish: int = 0
    save: int = 0
    evaluate: int = 0

    @property
    def stop_reason(self) -> str | None:
        """Why the run stops, or None."""
        if self.signalled:
            return "signal"
        return "train.max_seconds" if self.late else None


class Consensus:
    """The votes of one run, and its time limit."""

    def __init__(self, world: World, max_seconds: float | None, signals: Signals, control: RunControl) -> None:
        self._world = world
        self._control = control
        self._began = time.monotonic()
        self._limit = max_seconds
        self._signals = signals
        self._pending: tuple[int, Handle] | None = None
        signals.connected = True
        signals.abort = world.abort
        signals.ends_elsewhere = lambda: another_rank_failed(world.recorder)

    def stopped_before(self) -> str | None:
        """Return why the run stops before its first step, or None. All ranks call."""
        return "signal" if self._world.any(self._signals.received) else None

    def vote(self, row: int, ready: bool, skipped: bool) -> None:
        """Start to send this rank's votes after the step on the batch at ``row``. All ranks call."""
        late = self._limit is not None and time.monotonic() - self._began >= self._limit
        flags = (self._signals.received, late, ready, skipped, *self._control.take_requests())
        counts = [int(flag) for flag in flags]
        self._pending = row, self._world.agree(counts)

    def result(self) -> Votes:
        """Return the votes that were sent last, once; zeros where there are none. All ranks call."""
        if self._pending is None:
            return Votes()
        (row, handle), self._pending = self._pending, None
        return Votes(row, *handle.wait())
