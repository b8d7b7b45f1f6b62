"""A kind of interruptions of chaos.py: a run that is resumed from an earlier checkpoint than its newest, and killed.

What counts as the newest is compared with the times at which manifests were written, which hvdlm doesn't use.
"""

from __future__ import annotations

import contextlib
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

from interruptions import EVERY, Attempt, Kind, Program, Violation, check_losses, kill, send, wait_for

from hvdlm.checkpoints.discovery import step_folders

KEEP = (2, 4, 99)  # checkpoints that launches keep
SET_ASIDE = "set-aside-"


@dataclass(frozen=True)
class Written:
    """A checkpoint in a run's folder. ``identity``: its branch and sequence number; ``time``: in nanoseconds."""

    path: Path
    identity: tuple[str, int]
    time: int

    @property
    def step(self) -> int:
        """Its step."""
        return int(self.path.name.removeprefix("step-"))


def survey(folder: Path) -> tuple[list[Written], list[Written]]:
    """Return the checkpoints of a run, and those that were set aside or that a killed run had begun to."""
    leaving, kept, aside = {}, [], []
    with contextlib.suppress(FileNotFoundError):
        leaving = json.loads((folder / "set-aside.json").read_text())["numbers"]
    for path in [*folder.glob("step-*"), *folder.glob(f"{SET_ASIDE}*/step-*")]:
        with contextlib.suppress(FileNotFoundError):  # it is renamed meanwhile
            manifest = json.loads((path / "manifest.json").read_text())
            identity = (manifest["branch"], manifest["sequence"])
            written = Written(path, identity, (path / "manifest.json").stat().st_mtime_ns)
            left = path.parent != folder or leaving.get(path.name) == manifest["sequence"]
            (aside if left else kept).append(written)
    return kept, aside


def kill_and_compare(attempt: Attempt, chance: random.Random) -> None:
    """Kill a random rank, 4 times in 10 while it sets checkpoints aside; compare the checkpoints with before."""
    folder = attempt.folder / "checkpoints"
    kept, aside = survey(folder)  # before the ranks have loaded their libraries
    if attempt.resume and chance.random() < 0.4:
        wait_for(attempt, lambda: bool(survey(folder)[1][len(aside) :]), 60, every=0.001)
        time.sleep(chance.uniform(0, 0.005))
        send(attempt, chance, 9)
    else:
        kill(attempt, chance)
    attempt.wait()
    compare(attempt, kept, aside)


def compare(attempt: Attempt, kept: list[Written], aside: list[Written]) -> None:
    """Check what a launch has made of these checkpoints.

    Raises:
        Violation: one is lost, or the newest isn't the one that was written last, or it resumed from another one.
    """
    kept_now, aside_now = survey(attempt.folder / "checkpoints")
    names = {(w.identity, w.path.name) for w in (*kept_now, *aside_now)}
    later = [w for w in kept if w.step > attempt.first_step]
    lost = [w for w in (*aside, *later) if (w.identity, w.path.name) not in names]
    if lost:
        raise Violation(f"after a resumption from step {attempt.first_step}, there is no {lost[0].path} any more")
    last = max(kept_now, key=lambda w: w.time, default=None)
    newest = [path for _, path in step_folders(attempt.folder / "checkpoints")][:1]
    if newest != ([last.path] if last else []):
        raise Violation(f"{last.path if last else None} was written last, not {newest}")
    before = {w.identity for w in (*kept, *aside)}
    new = sorted(w.step for w in kept_now if w.identity not in before)
    expected = (attempt.first_step // EVERY + 1) * EVERY
    if new and new[0] != expected and len(new) < min(KEEP):  # otherwise, it may have deleted the first of them
        raise Violation(f"its first checkpoint is of step {new[0]}, not {expected}: it has resumed from another one")


def keeping(chance: random.Random) -> Program:
    """Return ``python -m hvdlm``, which keeps a random number of checkpoints."""
    return Program(options=("--checkpoint.keep", str(chance.choice(KEEP))))


def earlier(folder: Path, chance: random.Random) -> Path | None:
    """Return an earlier checkpoint than the newest, 6 times in 10."""
    paths = [path for _, path in step_folders(folder / "checkpoints")][1:]
    return chance.choice(paths) if paths and chance.random() < 0.6 else None


def check(folder: Path, expected: list[float], tolerance: float) -> None:
    """Check the losses of a run that has ended, and that its newest checkpoint is that of the last step."""
    check_losses(folder, expected, tolerance)
    latest = (folder / "checkpoints" / "latest").read_text()
    names = [path.name for _, path in step_folders(folder / "checkpoints")]
    if [latest] != names[:1] or int(latest.removeprefix("step-")) != len(expected):
        raise Violation(f"latest names {latest}, the newest checkpoints are {names} after {len(expected)} steps")
    if (folder / "checkpoints" / "set-aside.json").exists():
        raise Violation(f"{folder} has not set aside what it leaves behind")


BRANCH = Kind(kill_and_compare, program=keeping, resume=earlier, check=check)
