"""The phases of this process (starting, preparing data, connecting, training, ...), which the watchdog limits.

A process has one main thread, and so one ``process``: the command sets it up, and what the main thread calls (data,
backends, checkpoints) enters phases. While ranks aren't connected, they see each other's phases in files.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvdlm.diagnostics import failure_files
from hvdlm.diagnostics.flight_recorder import FlightRecorder, clean, named_ranks
from hvdlm.errors import HvdlmError
from hvdlm.io import launcher_env, rank_context, safe_files

DEFAULT_TIMEOUT = 300.0
"""Seconds; ``communication.timeout`` until the configuration is known."""

STARTUP_SECONDS = 60.0
"""Added to all limits until the second step begins: libraries are loaded, graphs built and code compiled."""

READING = 6.0
"""Patience of phases that read large files, wait for them or compile, of which some show no progress for minutes."""

TRAINING = "training"
"""The phase of the loop, in which the flight recorder shows what a rank does."""

_BEAT_SECONDS = 2.0  # between two writes of a phase file


@dataclass
class Phase:
    """One phase: it may be without progress for ``patience`` times ``communication.timeout`` (inf: without limit).

    ``waits``: for other ranks; the limit then counts from when the last of them was seen working.
    """

    name: str
    patience: float = 1.5
    waits: bool = False
    since: float = field(default_factory=time.monotonic)


def _exit(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Process:
    """This process as the watchdog sees it: its phases and its progress, and how to end it.

    Attributes:
        timeout: ``communication.timeout`` (s).
        recorder: the flight recorder, once ranks are connected.
        abort: ends this process, and all ranks that its transport reaches; does not return.
        closers: called once when the command has ended normally on all ranks.
        last: ``time.monotonic()`` of the latest progress.
    """

    def __init__(self) -> None:
        self._commands = -1
        self.reset()

    def reset(self) -> None:
        """Forget everything: a command begins, or a function of the Python API, of which a process may call several."""
        self._commands += 1
        self.rank = launcher_env.rank_for_messages()
        self.size = 1
        self.timeout = DEFAULT_TIMEOUT
        self.recorder: FlightRecorder | None = None
        own = rank_context.current()
        self.abort: Callable[[int], Any] = own.launch.end if own else _exit
        self.closers: list[Callable[[], Any]] = []
        self.last = time.monotonic()
        self.attempt: Path | None = None
        self._steps = 0
        self._phases = [Phase("starting: reading options, checkpoints and pretrained weights", READING)]
        self._written, self._shown = 0.0, ""
        self._signs: dict[int, tuple[Any, float]] = {}

    @property
    def phase(self) -> Phase:
        """The present phase."""
        return self._phases[-1]

    @contextmanager
    def during(self, name: str, patience: float = 1.5, waits: bool = False) -> Iterator[None]:
        """Be in a phase for the duration of the block; main thread only."""
        self._phases.append(Phase(name, patience, waits))
        self.alive()
        try:
            yield
        finally:
            self._phases.pop()
            self.alive()

    def begin(self, name: str) -> None:
        """Begin the next phase of the command."""
        self._phases = [Phase(name)]
        self.alive()

    def alive(self) -> None:
        """Note progress that is neither a step nor a collective."""
        self.last = time.monotonic()

    def step(self, number: int) -> None:
        """Note that step ``number`` begins."""
        self._steps += 1
        self.alive()
        if self.recorder is not None:
            self.recorder.step(number)

    @property
    def startup_seconds(self) -> float:
        """What is added to limits now."""
        return STARTUP_SECONDS if self._steps < 2 else 0.0

    @property
    def limit(self) -> float:
        """Seconds without progress after which the present phase has failed."""
        return self.phase.patience * self.timeout + self.startup_seconds

    @property
    def folder(self) -> Path | None:
        """The folder of markers and failures: the flight recorder's once ranks are connected, else the attempt's."""
        return self.recorder.folder if self.recorder is not None and self.recorder.folder else self.attempt

    def share(self, folder: Path, size: int, keep_seconds: float = 0.0) -> None:
        """Show phases and failures to this launch's other ranks, in a folder of its own below ``folder``.

        The first rank of each host deletes what earlier attempts left in ``folder``, after ``keep_seconds``.
        """
        self.size = size
        attempt = folder / f"attempt-{launcher_env.attempt()}{f'-{self._commands}' if self._commands > 1 else ''}"
        if launcher_env.launch_shape()[2] == 0:
            clean(folder)
            for other in folder.glob("attempt-*"):
                with suppress(OSError, HvdlmError):  # another host's first rank deletes them, too
                    if other != attempt and time.time() - other.lstat().st_mtime >= keep_seconds:
                        clean(other)
        if size == 1:
            self.attempt = folder
            return
        with suppress(OSError):  # ranks then don't see each other: only limits apply
            attempt.mkdir(parents=True, exist_ok=True)
            self.attempt = attempt
            self.write(force=True)

    def connect(self, recorder: FlightRecorder, abort: Callable[[int], Any]) -> None:
        """Note that ranks are connected."""
        self.recorder, self.abort = recorder, abort
        self.alive()

    def discard(self) -> None:
        """Delete this rank's files after a normal end, and folders that are empty then."""
        if self.attempt is not None:
            attempt, self.attempt = self.attempt, None
            with suppress(OSError):
                safe_files.delete_owned(attempt, rf"phase-{self.rank:04d}\.(json|part)")
        if self.recorder is not None:
            self.recorder.discard()

    def write(self, force: bool = False) -> None:
        """Write this rank's phase file, at most every few seconds; the watchdog's thread calls."""
        now, phase, attempt = time.monotonic(), self.phase, self.attempt  # the main thread may reset it meanwhile
        changes = phase.name != TRAINING or self._shown != TRAINING
        if attempt is None or self.size == 1 or not (force or (changes and now - self._written >= _BEAT_SECONDS)):
            return
        self._written, self._shown = now, phase.name
        state = {"phase": phase.name, "waits": phase.waits, "seconds": now - phase.since, "beat": now}
        state |= {"pid": os.getpid(), "host": socket.gethostname()}
        path = attempt / f"phase-{self.rank:04d}"
        with suppress(OSError):  # the folder may have been deleted: the other ranks' limits apply
            with safe_files.create(path.with_suffix(".part")) as file:
                file.write(json.dumps(state).encode())
            path.with_suffix(".part").replace(path.with_suffix(".json"))

    def others_work(self) -> bool:
        """Return whether another rank is seen at work: in a phase, such as compiling, in which it does not wait itself.

        Ranks in training may wait; one whose file has not changed for several writes was stopped or killed.
        """
        states = [state for state, age in self._other_ranks().values() if age < 5 * _BEAT_SECONDS]
        return any(not state["waits"] and state["phase"] != TRAINING for state in states)

    def _other_ranks(self) -> dict[int, tuple[dict[str, Any], float]]:
        """Return {rank: (its state, seconds since it last changed)}, by this host's clock."""
        if self.attempt is None:
            return {}
        now, states = time.monotonic(), {}
        for rank, state in failure_files.read_phases(self.attempt).items():
            if rank != self.rank:
                beat, seen = self._signs.get(rank, (None, now))
                seen = seen if beat == state["beat"] else now
                self._signs[rank] = state["beat"], seen
                states[rank] = state, now - seen
        return states

    def describe(self) -> str:
        """Return what this rank and the others are doing, for the report of a hang before or after training."""
        now, phase = time.monotonic(), self.phase
        lines = [f"Rank {self.rank} has been {phase.name}, for {now - phase.since:.0f} s."]
        states = self._other_ranks()
        for rank, (s, age) in sorted(states.items())[:16]:
            text = f"Rank {rank} (process {s['pid']} on {s['host']}): {s['phase']}, for {s['seconds'] + age:.0f} s"
            if age > 5 * _BEAT_SECONDS:
                text += f"; no sign of life for {age:.0f} s: it was stopped or killed"
            lines.append(text + ".")
        absent = sorted(set(range(self.size)) - {self.rank, *states})
        if absent:
            verb = "has" if len(absent) == 1 else "have"
            lines.append(
                f"Not arrived: {named_ranks(absent)}, which {verb} not begun, or can't "
                "be seen from here (on a host that does not share the folder)."
            )
        return "\n".join(lines)


process = rank_context.per_rank(Process)
"""The process that runs this code, or the rank of it, where ranks are threads."""
