"""Kinds of interruptions of chaos.py that damage one value of a rank's state: it must reach no checkpoint.

The run either rolls back by itself or ends with code 1 and a sentence. A restart follows the undisturbed run's losses,
up to a rollback that has left out batches.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from harness import FOLDER
from interruptions import RANKS, Attempt, Kind, Program, Violation, check_losses, losses, wait_for

from hvdlm.checkpoints.discovery import step_folders
from hvdlm.checkpoints.load import open_checkpoint
from hvdlm.checkpoints.state_checks import inspect
from hvdlm.parallel.flat_layout import whole

SENTENCES = ("no checkpoint to go back to", "did not help", "is not finite", "holds other values", "hold different")
FIRST_STEPS = 40  # the state is damaged in one of these
LOWEST_BIT = 12  # the difference that a lower bit makes may vanish by rounding before the next save


def program(chance: random.Random, how: str | int) -> Program:
    """Return the program that damages the state of a random rank."""
    fault = {
        "rank": chance.randrange(RANKS),
        "after": chance.randint(1, FIRST_STEPS),
        "what": chance.choice(["parameters", "optimizer"]),
        "position": chance.random(),
        "how": how,
    }
    return Program((str(FOLDER / "damage_worker.py"),), environment={"HVDLM_DAMAGE": json.dumps(fault)})


def wait_for_end(attempt: Attempt, chance: random.Random) -> None:
    """Wait until the launch has ended: it damages itself."""
    wait_for(attempt, lambda: False, 300)


def was_damaged(attempt: Attempt, code: int) -> bool:
    """Return whether the state was damaged: the run has to recover, or to end with code 1 and a sentence."""
    marker = attempt.folder / "damaged"
    if not marker.exists():
        return False
    marker.unlink()
    if code and (code != 1 or not any(text in attempt.errors() for text in SENTENCES)):
        raise Violation(f"a run whose state was damaged exited with code {code}: {attempt.errors()}")
    return True


def check_curve(folder: Path, expected: list[float], tolerance: float) -> None:
    """Check the losses of all steps, up to the first one after which batches were left out, and all checkpoints."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    equal = min([line["step"] for line in lines if line.get("batches_left_out")], default=len(expected))
    curve = losses(folder)
    if len(curve) == len(expected) and all(map(math.isfinite, curve)):
        expected = expected[:equal] + curve[equal:]
    check_losses(folder, expected, tolerance)
    for _, path in step_folders(folder / "checkpoints"):
        check_finite(path)


def check_finite(path: Path) -> None:
    """Check that all values of a checkpoint are finite."""
    opened = open_checkpoint(path)
    reader = opened.reader()
    for name, stored in opened.tensors.items():
        if not inspect(reader.read(name, whole(stored[0].shard.shape)), False)[0]:
            raise Violation(f"{name} of {path} is not finite")


def not_finite(chance: random.Random) -> Program:
    """Return the program in which a value becomes nan or inf."""
    return program(chance, chance.choice(["nan", "inf"]))


def flipped(chance: random.Random) -> Program:
    """Return the program in which a bit of a float32 flips."""
    return program(chance, chance.randrange(LOWEST_BIT, 32))


NAN = Kind(wait_for_end, ended=was_damaged, program=not_finite, check=check_curve)
FLIP = Kind(wait_for_end, ended=was_damaged, program=flipped, check=check_curve)
