"""The interruption "launcher signals" of chaos.py: Ctrl-C or SIGTERM to the launcher, which then kills its ranks."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time

from interruptions import RANKS, Attempt, Kind, Program, Violation, wait_for, wait_for_training

from hvdlm.errors import BAD_INPUT, STOPPED

_LAUNCHERS = (Program(), Program(launcher=("horovodrun", "--gloo")))


def program(chance: random.Random) -> Program:
    """Return ``python -m hvdlm`` under a random launcher."""
    return chance.choice(_LAUNCHERS)


def interrupt(attempt: Attempt, chance: random.Random) -> None:
    """Signal the launcher and its process group, as a terminal does: 1 time in 5 before the run trains."""
    if chance.random() < 0.2:
        wait_for(attempt, lambda: len(attempt.ranks()) == RANKS, 20)
        time.sleep(chance.uniform(0, 4))
    else:
        wait_for_training(attempt)
        time.sleep(chance.uniform(0, 2))
    with contextlib.suppress(ProcessLookupError):
        os.killpg(attempt.process.pid, chance.choice((signal.SIGINT, signal.SIGTERM)))


def was_interrupted(attempt: Attempt, code: int) -> bool:
    """Return whether the signal came before the end; whatever the launcher's exit code, status.json has to be true.

    horovodrun may exit with 0 although its ranks were interrupted.

    Raises:
        Violation: ``status.json`` is wrong, or a rank reported an error.
    """
    if code == BAD_INPUT or "damaged" in attempt.errors():
        raise Violation(f"a restart reports an error: {attempt.errors()}")
    path = attempt.folder / "status.json"
    status = json.loads(path.read_text()) if path.exists() else {"state": "running"}
    state, step = status["state"], status.get("step")
    if code == 0 and state == "done":
        return False
    if state == "stopped":
        saved = attempt.folder / "checkpoints" / f"step-{step:08d}" / "manifest.json"
        if status["code"] != STOPPED or (step and not saved.exists()):
            raise Violation(f"status.json says {status}, but there is no {saved}")
    elif state not in ("running", "interrupted", "done"):
        raise Violation(f"status.json says {status} after a signal to the launcher: {attempt.errors()}")
    return True


LAUNCHER_SIGNALS = Kind(interrupt, ended=was_interrupted, program=program)
