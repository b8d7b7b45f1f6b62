"""Ends a run that hangs, and says why: a thread on every rank watches its ledger, and who notices calls the others.

It is a hang when a collective is under way for longer than the time-out, or when nothing at all happens (no collective,
no step, no ``alive``) for half as long again: a rank that sleeps alone, or a graph that doesn't end. Until the second
step begins, libraries are loaded, graphs built and code compiled: all this may take a while longer.
"""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from pathlib import Path

from hvdlm.diagnostics import diagnosis, failure_files
from hvdlm.protocols.world import World

_FIRST_SECONDS = 60.0  # by which everything may take longer until the second step begins
_ANSWER_SECONDS = 5.0  # for which the others' stacks are waited for
_TURN_SECONDS = 3.0  # after which the next rank speaks, where the one before it does not
_LEAVE_SECONDS = 5.0  # in which the rank that spoke may end all


class Watchdog:
    """Watches over one rank's progress; ``timeout`` and ``poll`` are seconds."""

    def __init__(self, world: World, folder: Path, timeout: float, poll: float | None = None) -> None:
        self._world, self._folder, self._timeout = world, folder, timeout
        self._poll = min(1.0, timeout / 10) if poll is None else poll
        self._recorder = world.recorder
        self._since, self._steps = 0.0, 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hvdlm-sentinel", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._recorder.alive()
        self._thread.start()

    def step(self, number: int) -> None:
        """Note that step ``number`` begins."""
        self._steps += 1
        self._recorder.step(number)

    def alive(self) -> None:
        """Note that work goes on which is neither a step nor a collective (evaluation, writing a checkpoint)."""
        self._recorder.alive()

    def stop(self) -> None:
        """Watch no longer."""
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(2 * self._poll + 1)

    def _watch(self) -> None:
        before = time.monotonic()
        while True:
            # The last resort, where this thread itself gets no turn because native code holds the interpreter.
            faulthandler.dump_traceback_later(2 * self._timeout + _FIRST_SECONDS, exit=True, file=sys.__stderr__ or 2)
            if self._stopped.wait(self._poll) or self._recorder.failing:
                faulthandler.cancel_dump_traceback_later()
                return
            now = time.monotonic()
            if now - before > 5 * self._poll + 5:
                self._since = now  # this whole process stood still (a stopped job, a sleeping machine)
            before = now
            self._recorder.beat()
            if self._hangs(now) or failure_files.marked(self._folder, "hang"):
                self._end()
                return

    def _hangs(self, now: float) -> bool:
        oldest = max(self._since, min(list(self._recorder.open.values()), default=now))
        last, longer = max(self._since, self._recorder.last), _FIRST_SECONDS if self._steps < 2 else 0.0
        return now - oldest > self._timeout + longer or now - last > 1.5 * self._timeout + longer

    def _end(self) -> None:
        """Leave this rank's stack, wait for the others', and speak if no lower rank does; ends the process."""
        faulthandler.dump_traceback_later(60, exit=True, file=sys.__stderr__ or 2)
        failure_files.mark(self._folder, "hang")
        self._recorder.flush()
        failure_files.write_stack(self._folder, self._world.rank)
        if self._stopped.is_set() or self._recorder.failing:
            return
        answered = self._answers()
        before_us = sum(rank < self._world.rank for rank in answered)
        failure_files.await_word(lambda: failure_files.marked(self._folder, "told"), before_us * _TURN_SECONDS)
        if failure_files.mark(self._folder, "told"):
            failure_files.say(self._folder, self._diagnosis())
        else:
            time.sleep(_LEAVE_SECONDS)
        self._world.abort(1)

    def _answers(self) -> set[int]:
        """Return the ranks that wrote their stacks, all of them or as many as do in time."""
        failure_files.await_word(lambda: len(failure_files.stacked(self._folder)) >= self._world.size, _ANSWER_SECONDS)
        return failure_files.stacked(self._folder)

    def _diagnosis(self) -> str:
        scene, run = failure_files.read_scene(self._folder), self._folder.parent
        if not scene.views:  # the folder can't be written: what this rank knows itself
            return f"hvdlm: rank {self._world.rank} hangs for {self._timeout:g} s or more, in:\n{failure_files.stack()}"
        head = f"hvdlm: the run hangs (--communication.timeout {self._timeout:g})."
        more = f"All stacks lie in {self._folder}; python -m hvdlm doctor --run {run} tells this again."
        return f"{head}\n{diagnosis.explain(scene, time.time())}\n{more}"
