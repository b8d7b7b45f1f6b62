"""Watchdog that ends a run which hangs, with a diagnosis: a thread on every rank monitors the flight recorder.

A run hangs when a collective is in flight for longer than the time-out, or when a rank makes no progress at all (no
collective, no step, no ``alive``) for 1.5 times as long: a rank that sleeps, or a graph that doesn't end. Until the
second step begins both limits are a minute longer, while libraries are loaded, graphs built and code compiled. The
first rank to notice a hang leaves a marker file, on which all others react.
"""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from pathlib import Path

from hvdlm.diagnostics import diagnosis, failure_files
from hvdlm.protocols.world import World

_STARTUP_SECONDS = 60.0  # added to both limits until the second step begins
_STACK_SECONDS = 5.0  # waited for the other ranks' stacks
_TURN_SECONDS = 3.0  # after which the next rank reports, if the one before it has not
_ABORT_SECONDS = 5.0  # in which the rank that reported may end all ranks


class Watchdog:
    """Watchdog of one rank's progress; ``timeout`` and ``poll`` are seconds."""

    def __init__(self, world: World, folder: Path, timeout: float, poll: float | None = None) -> None:
        self._world = world
        self._folder = folder
        self._timeout = timeout
        self._poll = min(1.0, timeout / 10) if poll is None else poll
        self._recorder = world.recorder
        self._resumed = 0.0  # when the process continued after it had been suspended
        self._steps = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hvdlm-watchdog", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._recorder.alive()
        self._thread.start()

    def step(self, number: int) -> None:
        """Note that step ``number`` begins."""
        self._steps += 1
        self._recorder.step(number)

    def alive(self) -> None:
        """Note progress in work that is neither a step nor a collective (evaluation, writing a checkpoint)."""
        self._recorder.alive()

    def stop(self) -> None:
        """Stop the thread."""
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(2 * self._poll + 1)

    def _watch(self) -> None:
        before = time.monotonic()
        while True:
            # The last resort, for native code that holds the interpreter lock so that this thread can't run.
            faulthandler.dump_traceback_later(2 * self._timeout + _STARTUP_SECONDS, exit=True, file=sys.__stderr__ or 2)
            if self._stopped.wait(self._poll) or self._recorder.failing:
                faulthandler.cancel_dump_traceback_later()
                return
            now = time.monotonic()
            if now - before > 5 * self._poll + 5:
                self._resumed = now  # the whole process was suspended (a stopped job, a sleeping machine)
            before = now
            self._recorder.beat()
            if self._hangs(now) or failure_files.has_marker(self._folder, failure_files.HANG):
                self._end()
                return

    def _hangs(self, now: float) -> bool:
        oldest = max(self._resumed, self._recorder.open_since(now))
        last = max(self._resumed, self._recorder.last)
        startup = _STARTUP_SECONDS if self._steps < 2 else 0.0
        return now - oldest > self._timeout + startup or now - last > 1.5 * self._timeout + startup

    def _end(self) -> None:
        """Write this rank's stack, wait for the others', report the hang unless a lower rank does, and abort."""
        faulthandler.dump_traceback_later(60, exit=True, file=sys.__stderr__ or 2)
        failure_files.create_marker(self._folder, failure_files.HANG)
        self._recorder.flush()
        failure_files.write_stack(self._folder, self._world.rank)
        if self._stopped.is_set() or self._recorder.failing:
            return
        lower_ranks = sum(rank < self._world.rank for rank in self._ranks_with_stacks())
        failure_files.wait_for(
            lambda: failure_files.has_marker(self._folder, failure_files.REPORTED), lower_ranks * _TURN_SECONDS
        )
        if failure_files.create_marker(self._folder, failure_files.REPORTED):
            failure_files.report(self._folder, self._diagnosis())
        else:
            time.sleep(_ABORT_SECONDS)
        self._world.abort(1)

    def _ranks_with_stacks(self) -> set[int]:
        """Return the ranks that have written their stacks: all of them, or those that did in time."""
        failure_files.wait_for(
            lambda: len(failure_files.ranks_with_stacks(self._folder)) >= self._world.size, _STACK_SECONDS
        )
        return failure_files.ranks_with_stacks(self._folder)

    def _diagnosis(self) -> str:
        files = failure_files.read_files(self._folder)
        if not files.recordings:  # the folder can't be written: only this rank's stack is known
            stacks = failure_files.python_stacks()
            return f"hvdlm: rank {self._world.rank} has made no progress for {self._timeout:g} s or more, in:\n{stacks}"
        head = f"hvdlm: the run hangs (--communication.timeout {self._timeout:g})."
        advice = (
            f"All stacks are in {self._folder}; python -m hvdlm doctor --run {self._folder.parent} prints this again."
        )
        return f"{head}\n{diagnosis.explain(files, time.time())}\n{advice}"
