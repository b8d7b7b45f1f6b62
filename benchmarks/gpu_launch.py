"""Starts the launches of the GPU kit, and reads what they emit while it watches their deadlines."""

from __future__ import annotations

import ctypes
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpu_cases import Launch
from harness import EMITTED, command

from hvdlm.io import launcher_env

_END_SECONDS = 10.0  # for the launcher to end its ranks
_PR_SET_PDEATHSIG = 1


class Started:
    """A launch under way.

    Attributes:
        error: why it ended without all results; "": it did not.
        limited: whether the limit of the whole call ended it.
    """

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process = process
        self.error = ""
        self.limited = False
        self.lines: queue.Queue[str | None] = queue.Queue()
        self._log = log
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self._log.open("a", encoding="utf-8") as log:
            for line in self.process.stdout:
                log.write(line)
                log.flush()
                self.lines.put(line.rstrip("\n"))
        self.lines.put(None)

    def end(self) -> None:
        """End the launcher and its ranks, all in one process group."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is not None and number == signal.SIGTERM:
                continue
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(_END_SECONDS)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue

    def reason(self) -> str:
        """Return the last line of the output that tells of an error, or the exit code."""
        lines = [line.strip() for line in self._log.read_text(encoding="utf-8", errors="replace").splitlines()]
        telling = [line for line in lines if re.search(r"\w(Error|Exception): |^hvdlm: .*(rank|backend|failed)", line)]
        return (telling or [f"exit code {self.process.poll()}"])[-1][:300]


def _end_with_parent() -> None:
    """Let the kernel end the launcher where this process is killed, which would leave it on the GPU."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def start(script: str, launch: Launch, options: list[str], folder: Path) -> Started:
    """Start a worker script on the ranks of a launch; its output is kept in a file in ``folder``."""
    env = launcher_env.for_launchers()
    if launch.cpu:
        env["CUDA_VISIBLE_DEVICES"] = ""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{launch.name.replace(' ', '-').replace(':', '').replace(',', '')}.log"
    log.write_text("", encoding="utf-8")
    process = subprocess.Popen(
        command(script, launch.ranks, *options),
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=_end_with_parent,
    )
    return Started(process, log)


def results(started: Started, deadline: float, left: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """Yield the values of each case as it ends; end the launch where one takes too long.

    Args:
        started: the launch
        deadline: seconds that a case may take
        left: returns the seconds that remain of the whole call
    """
    due = time.monotonic() + deadline
    try:
        while True:
            try:
                line = started.lines.get(timeout=max(0.01, min(due - time.monotonic(), left())))
            except queue.Empty:
                started.limited = left() <= 0
                if not started.limited:
                    started.error = f"no result within {deadline:.0f} s"
                return
            if line is None:
                started.process.wait(_END_SECONDS)
                if started.process.returncode:
                    started.error = started.reason()
                return
            if line.startswith(f"{EMITTED}end "):
                yield json.loads(line.partition(" ")[2])
                due = time.monotonic() + deadline
    finally:
        started.end()
