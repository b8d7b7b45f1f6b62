"""Signals that ask a run to save and stop."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

_TOGETHER = 1.0  # seconds within which signals count as one: schedulers signal launchers and ranks alike


class Signals:
    """Handles SIGTERM, SIGINT, SIGUSR1 and SIGHUP (unless nohup ignores it) from the start of the command on.

    The first asks to save and stop. A second one, more than a second later, ends at once: this process until ranks are
    connected, then all ranks, through ``abort``. A thread waits for signals, so that they are noticed while the main
    thread is blocked in a collective. ``ends_elsewhere``: returns whether another rank has failed, so that the signal
    is the launcher's.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._first = 0.0
        self._over = False
        self.abort: Callable[[int], Any] = os._exit
        self.ends_elsewhere: Callable[[], bool] = lambda: False

    @property
    def received(self) -> bool:
        """Whether a signal was received."""
        return self._first > 0

    def listen(self) -> Signals:
        """Install the handlers; main thread only."""
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # under nohup, the run outlives its terminal
            signal.signal(number, lambda *_: None)  # the thread acts, whatever the main thread is doing
        threading.Thread(target=self._wait, args=(read_end,), name="hvdlm-signals", daemon=True).start()
        return self

    def ignore(self) -> None:
        """Ignore signals from now on: everything is saved, and this process ends; main thread only."""
        self._over = True
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # an interpreter that exits resets Python's handlers

    def _wait(self, read_end: int) -> None:
        while numbers := os.read(read_end, 64):
            for number in numbers:
                if number in SIGNALS:
                    self._handle(number)

    def _handle(self, number: int) -> None:
        if self._over:
            return
        if self.ends_elsewhere():  # another rank has failed and reported it: the launcher ends this one
            os._exit(1)
        now, name, again = time.monotonic(), signal.Signals(number).name, self.received
        if again and now - self._first < _TOGETHER:
            return
        self._first = self._first or now
        if again:
            action = "again: stopped at once"
        else:
            action = "the run saves after this step and stops; once more stops at once"
        print(f"hvdlm: rank {self._rank}: {name}: {action}", file=sys.stderr, flush=True)
        if again:
            self.abort(128 + number)
