"""The interruption "two runs" of chaos.py: a second run is started in the folder of one that is running."""

from __future__ import annotations

import random
import signal
import subprocess
import time

import psutil
from interruptions import LIMIT, Attempt, Kind, Program, Violation, send, wait_for, wait_for_training, was_killed

from hvdlm.errors import BAD_INPUT
from hvdlm.training.run_lock import NAME

_SECONDS = 300.0  # for a second run that is not refused, because the first has ended meanwhile

# A run takes longer than a second one until it is refused, also on a machine that has nothing else to do.
_SLOW = """
import sys, time
from hvdlm import cli, hookimpl, telemetry

class Slow:
    @hookimpl
    def hvdlm_step_ended(self):
        time.sleep(0.1)

plugins = telemetry.default_plugins
telemetry.default_plugins = lambda config: [*plugins(config), Slow()]
sys.exit(cli.main())
"""


def intrude(attempt: Attempt, chance: random.Random) -> None:
    """Start a second run in the folder, which has to be refused; then kill a random rank of the first, or all.

    Raises:
        Violation: the second run was accepted, or took too long to be refused.
    """
    began = time.time()
    if chance.random() < 0.3:  # as soon as the first has locked its folder
        lock = attempt.folder / NAME
        wait_for(attempt, lambda: lock.exists() and lock.stat().st_mtime > began, 60)
    else:
        wait_for_training(attempt)
        time.sleep(chance.uniform(0, 2))
    if attempt.running():
        _check_second(attempt, chance)
    if chance.random() < 0.5:
        send(attempt, chance, signal.SIGKILL)
    else:
        for rank in attempt.ranks():
            _kill(rank)


def _kill(rank: psutil.Process) -> None:
    try:
        rank.kill()
    except psutil.NoSuchProcess:
        pass


def _check_second(attempt: Attempt, chance: random.Random) -> None:
    second = _start(attempt, chance)
    deadline = time.monotonic() + LIMIT
    while second.poll() is None and attempt.running() and time.monotonic() < deadline:
        time.sleep(0.05)
    first_ran = attempt.running()
    if second.poll() is None and first_ran:
        second.kill()
        raise Violation(f"a second run was not refused within {LIMIT:.0f} s")
    errors = second.communicate(timeout=_SECONDS)[1]
    if first_ran and (second.returncode != BAD_INPUT or "is being written by another run" not in errors):
        raise Violation(f"a second run in the folder exited with code {second.returncode}: {errors[-3000:]}")


def _start(attempt: Attempt, chance: random.Random) -> subprocess.Popen[str]:
    """Start the second run, which resumes or overwrites."""
    options = chance.choice(
        (["--checkpoint.resume", "auto"], ["--checkpoint.resume", "none", "--log.overwrite", "true"])
    )
    # The folder is spelled in another way: the processes of the first run are known by it.
    command = [word.replace(str(attempt.folder), f"{attempt.folder}/.") for word in attempt.command]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *options], env=attempt.environment, **streams)  # type: ignore[call-overload]


def first_was_killed(attempt: Attempt, code: int) -> bool:
    """Return whether the kill came before the end; the first run itself may never be refused."""
    if code == BAD_INPUT:
        raise Violation(f"the first run, or its restart, was refused: {attempt.errors()}")
    return was_killed(attempt, code)


TWO_RUNS = Kind(intrude, ended=first_was_killed, program=lambda chance: Program(words=("-c", _SLOW)))
