"""Watchdog that ends a process which hangs, with a diagnosis: a thread on every rank, from its start to its end.

A rank hangs when a collective is in flight for longer than the time-out, or when its phase (``phases``) makes no
progress (no collective, no step, no ``alive``) for longer than its limit: a rank that sleeps, or a graph that doesn't
end. The first rank to notice a hang leaves a marker file, on which all others react.
"""

from __future__ import annotations

import faulthandler
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from hvdlm.diagnostics import failure_files
from hvdlm.diagnostics.explanations import diagnosis
from hvdlm.diagnostics.phases import STARTUP_SECONDS, TRAINING, Phase, Process, process
from hvdlm.errors import BAD_INPUT, FAILED, HvdlmError
from hvdlm.io import rank_context

_STACK_SECONDS = 5.0  # waited for the other ranks' stacks
_TURN_SECONDS = 3.0  # after which the next rank reports, if the one before it has not
_ABORT_SECONDS = 5.0  # in which the rank that reported may end all ranks
_FILE_SECONDS = 20.0  # in which the file system has to respond, besides the times above


class Watchdog:
    """Watchdog of one process; ``poll``: seconds between two looks at its progress, None: from the time-out."""

    def __init__(self, watched: Process, poll: float | None = None) -> None:
        self.code = FAILED
        self._process = watched
        self._fixed_poll = poll
        self._resumed = 0.0  # when the process continued after it had been suspended
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hvdlm-watchdog", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._process.alive()
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread."""
        self._stopped.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(2 * self._poll + 1)
        faulthandler.cancel_dump_traceback_later()

    @property
    def _poll(self) -> float:
        return min(1.0, self._process.timeout / 10) if self._fixed_poll is None else self._fixed_poll

    @property
    def _failing(self) -> bool:
        recorder = self._process.recorder
        return recorder is not None and recorder.failing

    def _watch(self) -> None:
        before = time.monotonic()
        while True:
            self._arm_last_resort()
            if self._stopped.wait(self._poll):
                return
            if self._failing:  # it reports its error, which takes seconds unless the file system doesn't respond
                faulthandler.dump_traceback_later(60 + self._process.rank, exit=True, file=sys.__stderr__ or 2)
                return
            now = time.monotonic()
            if now - before > 5 * self._poll + 5:
                self._resumed = now  # the whole process was suspended (a stopped job, a sleeping machine)
            before = now
            self._process.write()
            if self._process.recorder is not None:
                self._process.recorder.beat()
            if self._another_failed():
                return
            if self._hangs(now) or failure_files.has_marker(self._process.folder, failure_files.HANG):
                self._end()
                return

    def _arm_last_resort(self) -> None:
        """End the process by a timer in C where native code holds the interpreter lock, so that no thread can run."""
        patience = max(self._process.phase.patience, 1.5) + 0.5
        if math.isfinite(patience):
            seconds = patience * self._process.timeout + STARTUP_SECONDS
            faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or 2)
        else:
            faulthandler.cancel_dump_traceback_later()

    def _hangs(self, now: float) -> bool:
        watched, phase = self._process, self._process.phase
        recorder = watched.recorder
        last = max(self._resumed, watched.last, recorder.last if recorder else 0.0)
        if phase.waits:
            if now - last > watched.limit / 2 and watched.others_work():
                watched.alive()  # they have limits of their own
                return False
        late = now - last > watched.limit
        if recorder is not None and not phase.waits and phase.patience <= Phase.patience:
            oldest = max(self._resumed, recorder.open_since(now))
            late = late or now - oldest > watched.timeout + watched.startup_seconds
        return late and not (phase.name == TRAINING and watched.others_work())  # they have limits of their own

    def _another_failed(self) -> bool:
        """End this process where another rank failed before ranks were connected: it may not be able to end others."""
        folder = self._process.attempt
        if self._process.recorder is not None or not failure_files.has_marker(folder, failure_files.REPORTED):
            return False
        codes = [f.code for r, f in failure_files.read_failures(folder).items() if r != self._process.rank]
        if not codes:  # this rank has reported an error, or ranks have reported a hang
            return False
        if not self._stopped.wait(_ABORT_SECONDS):  # the launcher usually ends this rank, too
            self._process.abort(codes[0])
        return True

    def _end(self) -> None:
        """Write this rank's stack, wait for the others', report the hang unless a lower rank does, and abort."""
        faulthandler.dump_traceback_later(120, exit=True, file=sys.__stderr__ or 2)
        folder, watched = self._process.folder, self._process
        seconds = _FILE_SECONDS + _STACK_SECONDS + watched.rank * _TURN_SECONDS
        reports = failure_files.within(min(seconds, 90.0), lambda: self._has_to_report(folder), True)
        if self._stopped.is_set() or self._failing:
            return
        if reports:
            print(self._diagnosis(folder), file=sys.stderr, flush=True)
        else:
            time.sleep(_ABORT_SECONDS)
        watched.abort(FAILED)

    def _has_to_report(self, folder: Path | None) -> bool:
        """Write this rank's stack; return whether it is the one to report the hang."""
        if folder is None:
            return True
        failure_files.create_marker(folder, failure_files.HANG)
        if self._process.recorder is not None:
            self._process.recorder.flush()
        failure_files.write_stack(folder, self._process.rank)
        lower_ranks = sum(rank < self._process.rank for rank in self._ranks_with_stacks(folder))
        failure_files.wait_for(
            lambda: failure_files.has_marker(folder, failure_files.REPORTED), lower_ranks * _TURN_SECONDS
        )
        return failure_files.create_marker(folder, failure_files.REPORTED)

    def _ranks_with_stacks(self, folder: Path) -> set[int]:
        """Return the ranks that have written their stacks: all of them, or those that did in time."""
        failure_files.wait_for(
            lambda: len(failure_files.ranks_with_stacks(folder)) >= self._process.size, _STACK_SECONDS
        )
        return failure_files.ranks_with_stacks(folder)

    def _diagnosis(self, folder: Path | None) -> str:
        """Return what is known about the hang; it is also written to ``diagnosis.txt``."""
        watched = self._process
        head = f"hvdlm: the run hangs (--communication.timeout {watched.timeout:g})."
        text = failure_files.within(_FILE_SECONDS, lambda: self._explanation(folder), "") if folder else ""
        if not text:  # the folder can't be written or read: only this rank is known
            text = f"{watched.describe()}\nIts stacks:\n{failure_files.python_stacks()}"
        failure_files.within(_FILE_SECONDS, lambda: failure_files.write_diagnosis(folder, f"{head}\n{text}"), None)
        return f"{head}\n{text}"

    def _explanation(self, folder: Path) -> str:
        watched, text = self._process, diagnosis().explain_hang(folder, time.time())
        if text is None or watched.phase.name != TRAINING:
            text = f"{watched.describe()}\n{text or diagnosis().explain_stacks(folder)}"
        advice = f"All stacks are in {folder}"
        run = next((parent for parent in folder.parents if (parent / "flight_recorder").is_dir()), None)
        return f"{text}\n{advice}" + (f"; python -m hvdlm doctor --run {run} prints this again." if run else ".")


_watched = rank_context.per_rank(threading.Lock)


@contextmanager
def watching(process_ends: bool = True) -> Iterator[Watchdog]:
    """Watch this process while a command runs, and its exit afterwards; set ``code`` to the command's exit code.

    Where the command fails before ranks are connected, those that MPI reaches are ended. Without ``process_ends``, a
    program continues afterwards: its transport stays open, and its exit is its own.

    Raises:
        HvdlmError: something is being watched already.
    """
    if not _watched.acquire(blocking=False):
        raise HvdlmError(
            "hvdlm is in use in this process: call train, load, evaluate and generate one after another, or start "
            "another process."
        )
    process.reset()
    watchdog = Watchdog(process)
    watchdog.start()
    try:
        diagnosis()
        yield watchdog
        for close in reversed(process.closers if process_ends else []):
            close()
    except Exception as error:
        refused = isinstance(error, HvdlmError)
        watchdog.code = BAD_INPUT if refused else FAILED
        if not refused or not process_ends:  # the command line reports what is refused
            _leave_failure(error, watchdog.code)
        raise
    finally:
        watchdog.stop()
        if process_ends:
            _watch_exit(watchdog.code, process.limit)
        _watched.release()


def _leave_failure(error: Exception, code: int) -> None:
    """Write the error of a rank that fails before ranks are connected: those that wait for it end after a moment."""
    if process.recorder is None and process.size > 1:
        failure = replace(failure_files.make_failure(process.rank, error, 0, is_cause=True), code=code)
        failure_files.write_failure(process.attempt, failure)
        failure_files.create_marker(process.attempt, failure_files.REPORTED)


_exit_limits: list[tuple[int, float]] = []


def _watch_exit(code: int, seconds: float) -> None:
    """End this process with ``code`` where its exit takes longer than ``seconds``; the latest call applies."""
    _exit_limits.append((code, seconds))
    if len(_exit_limits) == 1:
        threading.Thread(target=_end_exit, name="hvdlm-exit", daemon=True).start()


def _end_exit() -> None:
    """Wait until the main thread has ended, then for non-daemon threads and exit handlers of libraries."""
    threading.main_thread().join()
    code, seconds = _exit_limits[-1]
    if signal.getsignal(signal.SIGALRM) == signal.SIG_DFL:
        # Libraries' destructors run when no thread of Python does any more: the signal's default action ends them.
        signal.alarm(math.ceil(seconds) + 30)
    time.sleep(seconds)
    stacks = failure_files.python_stacks()
    print(
        f"hvdlm: rank {process.rank}: the command has ended, but exit handlers or threads of libraries have not for "
        f"{seconds:.0f} s: ended without them, in:\n{stacks}",
        file=sys.stderr,
        flush=True,
    )
    os._exit(code)
