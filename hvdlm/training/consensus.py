"""What ranks agree on between steps: signals, time limits, skipped updates, saves that are ready.

Every rank tells at the end of a step and hears at the end of the next what all told, so that an agreement costs no
waiting; what follows from it is decided by what was heard alone, at the same step on all ranks.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from hvdlm.diagnostics.abort import told_elsewhere
from hvdlm.protocols.group import Handle
from hvdlm.protocols.world import World

STOPPED = 75
"""Exit code of a run that was asked to stop and has saved (EX_TEMPFAIL): schedulers may queue it again."""

_TOGETHER = 1.0  # seconds within which signals count as one
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Votes(NamedTuple):
    """What all told a step ago.

    Attributes:
        row: the first row of that step's batch; None: nobody has told anything.
        signalled, late, ready, skipped: on how many ranks a signal had come, time was over, the part of a save that is
            under way was done, the update was left out.
    """

    row: int | None = None
    signalled: int = 0
    late: int = 0
    ready: int = 0
    skipped: int = 0

    @property
    def reason(self) -> str | None:
        """Why the run stops, or None."""
        if self.signalled:
            return "signal"
        return "train.max_seconds" if self.late else None


class Signals:
    """Hears SIGTERM, SIGINT and SIGUSR1 from the start of the command on: the first asks to save and stop.

    A second one, not together with the first (schedulers signal launchers and ranks alike), ends at once: this process
    until ranks have met, then all ranks, through ``abort``. A thread waits for them, so that they are heard while the
    main thread waits for a collective.
    """

    def __init__(self, rank: int) -> None:
        self._rank, self._first, self._over = rank, 0.0, False
        self.abort: Callable[[int], Any] = os._exit
        self.ends_elsewhere: Callable[[], bool] = lambda: False

    @property
    def asked(self) -> bool:
        """Whether a signal has come."""
        return self._first > 0

    def listen(self) -> Signals:
        """Take over the signals; main thread only."""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)  # the thread acts, whatever the main thread is doing
        threading.Thread(target=self._wait, args=(reading,), name="hvdlm-signals", daemon=True).start()
        return self

    def ignore(self) -> None:
        """Hear no more: all is saved, and this process ends; main thread only."""
        self._over = True
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # an interpreter that ends gives Python's handlers up

    def _wait(self, reading: int) -> None:
        while numbers := os.read(reading, 64):
            for number in numbers:
                if number in SIGNALS:
                    self._caught(number)

    def _caught(self, number: int) -> None:
        if self._over:
            return
        if self.ends_elsewhere():  # another rank has failed and said so: the launcher ends this one
            os._exit(1)
        now, name, again = time.monotonic(), signal.Signals(number).name, self.asked
        if again and now - self._first < _TOGETHER:
            return
        self._first = self._first or now
        what = "again: stopped at once" if again else "the run saves after this step and stops; once more stops at once"
        print(f"hvdlm: rank {self._rank}: {name}: {what}", file=sys.stderr, flush=True)
        if again:
            self.abort(128 + number)


class Control:
    """The time limit and the agreement of one run."""

    def __init__(self, world: World, max_seconds: float | None, signals: Signals) -> None:
        self._world, self._began, self._limit, self._signals = world, time.monotonic(), max_seconds, signals
        self._under_way: tuple[int, Handle] | None = None
        signals.abort, signals.ends_elsewhere = world.abort, lambda: told_elsewhere(world.recorder)

    def stopped_before(self) -> str | None:
        """Return why the run stops before its first step, or None. All ranks call."""
        return "signal" if self._world.any(self._signals.asked) else None

    def tell(self, row: int, ready: bool, skipped: bool) -> None:
        """Begin to tell how this rank stands after the step on the batch at ``row``. All ranks call."""
        late = self._limit is not None and time.monotonic() - self._began >= self._limit
        counts = [int(flag) for flag in (self._signals.asked, late, ready, skipped)]
        self._under_way = row, self._world.agree(counts)

    def hear(self) -> Votes:
        """Return what all ranks told last, once; zeros where nothing was. All ranks call."""
        told, self._under_way = self._under_way, None
        return Votes(told[0], *told[1].wait()) if told is not None else Votes()
