"""Signals that ask a run to save and stop."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from hvdlm.io import launcher_env, rank_context

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

LAUNCHER_ENDS = "the launcher ends, interrupted or because a rank has ended"
"""What rank 0 prints when the launcher gives notice that it will kill its ranks."""

_WAITS = "Ctrl-C of python -m hvdlm run or supervise, which wait for the save"
_NOTE_SECONDS = 1.0  # given to the file system to note a signal
_AGAIN_SECONDS = 0.1  # between two signals to the main thread
_TOGETHER = 1.0  # seconds within which signals count as one: schedulers signal launchers and ranks alike


class Signals:
    """Handles SIGTERM, SIGINT, SIGUSR1 and SIGHUP (unless nohup ignores it) from the start of the command on.

    The first asks to save and stop. A second one, more than a second later, ends at once: this process until ranks are
    connected, then all ranks, through ``abort``. A thread waits for signals, so that they are noticed while the main
    thread is blocked in a collective.

    Launchers that end kill their ranks, whether these have saved or not. Open MPI gives notice by a SIGCONT, one
    time-out before SIGTERM and two before SIGKILL: another thread waits for it.

    Attributes:
        abort: ends the ranks, given an exit code.
        ends_elsewhere: returns whether another rank has failed, so that the signal is the launcher's.
        on_request: called with the reason why the run stops, or ends at once with an exit code.
        connected: whether ranks are connected: until then there is nothing to save.
        interrupts: whether a second signal raises KeyboardInterrupt in the main thread in place of ending the process.
        checkpoint: the step of the newest checkpoint, or None.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._first = 0.0
        self._over = False
        self._launcher_ends = False
        self._limit = launcher_env.kill_seconds()
        self._warned = False
        self.abort: Callable[[int], Any] = os._exit
        self.ends_elsewhere: Callable[[], bool] = lambda: False
        self.on_request: Callable[[str, int | None], Any] = lambda reason, code: None
        self.connected = False
        self.interrupts = False
        self.checkpoint: int | None = None
        self._raising = False
        self._restorers: list[Callable[[], Any]] = []  # undo what ``listen`` did, the last first

    @property
    def received(self) -> bool:
        """Whether a signal was received."""
        return self._first > 0

    def listen(self) -> Signals:
        """Install the handlers before there are other threads; does nothing outside of the main thread."""
        rank_context.in_main_thread(self._install)
        return self

    def _install(self) -> None:
        if launcher_env.started_by_open_mpi():
            # Blocked in all threads, it can be waited for along with its sender; it continues a stopped process anyway.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCONT})
            waiting = threading.Thread(target=self._wait_for_launcher, name="hvdlm-launcher", daemon=True)
            waiting.start()
            self._restorers += [lambda: signal.pthread_sigmask(signal.SIG_SETMASK, mask), lambda: _wake(waiting)]
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        before = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        acting = threading.Thread(target=self._wait, args=(read_end,), name="hvdlm-signals", daemon=True)
        acting.start()
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if number == signal.SIGHUP and handler == signal.SIG_IGN:
                continue  # under nohup, the run outlives its terminal
            signal.signal(number, self._interrupt)
            self._restorers.append(partial(signal.signal, number, handler or signal.SIG_DFL))
        # The thread has ended before the program's own handlers are back, so that it sends them no signal.
        self._restorers += [acting.join, lambda: os.close(write_end), lambda: signal.set_wakeup_fd(before)]

    def _interrupt(self, *_: Any) -> None:
        """Raise KeyboardInterrupt where a second signal asks for it; the thread acts on the first."""
        if self._raising:
            self._raising = False
            raise KeyboardInterrupt

    def ignore(self) -> None:
        """Ignore signals from now on: everything is saved, and this process ends or restores its own handlers."""
        self._over = True
        if self._restorers:
            rank_context.in_main_thread(_ignore)

    def restore(self) -> None:
        """Install the handlers that were there before ``listen`` again, and end its threads."""
        self._over, self._raising = True, False
        while self._restorers:
            rank_context.in_main_thread(self._restorers.pop())

    def warn_of_limit(self, seconds: float) -> None:
        """Print once, on rank 0, that a save takes longer than the launcher waits before it kills its ranks."""
        if self._rank or self._warned or self._limit is None or seconds <= self._limit or launcher_env.supervised():
            return
        self._warned = True
        launcher = launcher_env.open_mpi_launcher() if launcher_env.started_by_open_mpi() else None
        self._print(
            f"to stop and save takes {seconds:.3g} s, but Ctrl-C makes the launcher kill its ranks after "
            f"{self._limit:g} s. Use kill -USR1 {launcher or os.getpid()} instead, or {_WAITS}."
        )

    def _wait(self, read_end: int) -> None:
        with open(read_end, "rb", buffering=0) as pipe:
            while numbers := pipe.read(64):
                for number in numbers:
                    if number in SIGNALS:
                        self._handle(number)

    def _wait_for_launcher(self) -> None:
        while True:
            sender = signal.sigwaitinfo({signal.SIGCONT}).si_pid
            if self._over and sender == os.getpid():
                return
            if launcher_env.is_open_mpi_launcher(sender) and not self._over:
                self._handle_launcher()

    def _handle_launcher(self) -> None:
        """The launcher ends: it was asked to, or a rank has died. Its SIGTERM will follow."""
        if self.ends_elsewhere():
            os._exit(1)
        self._launcher_ends = True
        if self.received:
            return
        self._first = time.monotonic()
        if self._rank == 0:
            self._print(f"{LAUNCHER_ENDS}: {self._prospect(from_launcher=True)}.")
        self._note("the launcher ended the run")

    def _handle(self, number: int) -> None:
        if self._over or (self._launcher_ends and number == signal.SIGTERM):
            return
        if self.ends_elsewhere():  # another rank has failed and reported it: the launcher ends this one
            os._exit(1)
        now, name, again = time.monotonic(), signal.Signals(number).name, self.received
        if again and now - self._first < _TOGETHER:
            return
        self._first = self._first or now
        if again:
            self._print(f"rank {self._rank}: {name}: again: stopped at once")
            if self.interrupts:
                self._interrupt_main()
                return
            self._note(f"{name} after an earlier signal", 128 + number)
            self.abort(128 + number)
            return
        from_launcher = launcher_env.has_gloo_rendezvous() and number == signal.SIGTERM
        self._print(f"rank {self._rank}: {name}: {self._prospect(from_launcher)}; once more stops at once.")
        self._note(name)

    def _interrupt_main(self) -> None:
        """Raise KeyboardInterrupt in the main thread.

        A signal wakes it from a system call, too, unless it arrives just before the call: it is sent again.
        """
        self._over = self._raising = True
        while self._raising:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            time.sleep(_AGAIN_SECONDS)

    def _note(self, reason: str, code: int | None = None) -> None:
        """Call ``on_request``; where it blocks, as on a file server that is gone, continue without it."""
        noting = threading.Thread(target=self.on_request, args=(reason, code), daemon=True)
        noting.start()
        noting.join(_NOTE_SECONDS)

    def _prospect(self, from_launcher: bool) -> str:
        """Return what follows from the first signal; of one that a launcher may have sent, nothing is promised."""
        if not self.connected:
            return "the run stops before its first step"
        if not from_launcher or self._limit is None:
            return "the run saves after this step and stops"
        resumes = "starts again" if self.checkpoint is None else f"resumes from step {self.checkpoint}"
        return (
            f"ranks are killed in {self._limit:g} s: the run saves if that takes less, else it {resumes}. Without a "
            f"limit of time: kill -USR1 of {'mpirun' if self._launcher_ends else 'a rank'}, or {_WAITS}"
        )

    def _print(self, text: str) -> None:
        print(f"hvdlm: {text}", file=sys.stderr, flush=True)


def _ignore() -> None:
    """Ignore the signals: an interpreter that exits resets Python's handlers."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _wake(waiting: threading.Thread) -> None:
    """End the thread that waits for SIGCONT."""
    if waiting.ident is not None:
        signal.pthread_kill(waiting.ident, signal.SIGCONT)
        waiting.join(_NOTE_SECONDS)
