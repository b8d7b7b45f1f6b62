"""How far a run has come and how it ended, read from its folder without opening anything large."""

from __future__ import annotations

import contextlib
import json
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdlm.errors import STOPPED

CODES = {"done": 0, "failed": 1, "refused": 2, "stopped": STOPPED}
"""What a run came to, and the exit code that says so. ``stopped``: saved, to be gone on with (EX_TEMPFAIL)."""

_STEP = re.compile(r"step-(\d{8,18})")
_NOTICED = re.compile(r"process rank (\d+) with PID \d+ on node (\S+) exited on signal (\d+)")
_ASKED = re.compile(r"rank \d+: SIG[A-Z0-9]+: ")  # launchers ask the others to stop where one died: no cause
_RAISED = re.compile(r"(?:\[\S*>:?)?[\w.]*(?:Error|Exception)\b")
_LIMIT = 2**20  # a status.json larger than this is none of ours


@dataclass(frozen=True)
class Standing:
    """What a run's folder tells.

    Attributes:
        checkpoint: the step of the newest checkpoint that has a manifest, None without one.
        written: when and as what that manifest was written; tells a checkpoint from another one of the same step.
        status: what ``status.json`` holds; empty where there is none.
    """

    checkpoint: int | None
    written: tuple[int, int] | None
    status: dict[str, Any]

    @classmethod
    def of(cls, folder: Path) -> Standing:
        """Read ``folder``, which need not exist."""
        steps = {
            int(found[1]): path for path in _listed(folder / "checkpoints") if (found := _STEP.fullmatch(path.name))
        }
        for step in sorted(steps, reverse=True):
            with contextlib.suppress(OSError):
                stat = (steps[step] / "manifest.json").stat()
                return cls(step, (stat.st_mtime_ns, stat.st_ino), _status(folder / "status.json"))
        return cls(None, None, _status(folder / "status.json"))

    @property
    def step(self) -> int:
        """The furthest step of which the folder knows."""
        told = self.status.get("step")
        return max(self.checkpoint or 0, told if type(told) is int else 0)

    def __str__(self) -> str:
        """Return what there is to go on from."""
        return "no checkpoint yet" if self.checkpoint is None else f"the checkpoint of step {self.checkpoint}"


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _status(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LIMIT:
            return {}
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def verdict(code: int, status: dict[str, Any], errors: list[str]) -> tuple[str, str]:
    """Return what an attempt came to and why. ``status``: what it wrote into status.json, nothing where nothing."""
    if code == 1:  # horovodrun --gloo hides a rank's code, and tells it
        told = re.findall(r"^Exit code: (\d+)$", "\n".join(errors), re.M)
        code = int(told[-1]) if told else code
    state = status.get("state")
    if not isinstance(state, str) or state not in CODES:
        # A run that ended in order says so: one that still calls itself running lost rank 0.
        known = {value: name for name, value in CODES.items() if not (status and name == "done")}
        state = known.get(code, "failed")
    return state, str(status.get("reason") or (_cause(code, errors) if state in ("failed", "refused") else ""))


def _cause(code: int, errors: list[str]) -> str:
    """Return whom mpirun saw die, else hvdlm's own last sentence, else the last exception, else the signal."""
    seen = [_NOTICED.search(line) for line in errors]
    died = [f"rank {found[1]} on {found[2]}: {_name(int(found[3]))}" for found in seen if found]
    own = [line.partition("hvdlm: ")[2] for line in errors if "hvdlm: " in line]
    own = [sentence for sentence in own if not _ASKED.match(sentence)]
    raised = [line for line in errors if _RAISED.match(line) and "Horovod detected" not in line]
    said = died or own or raised
    return said[-1][:500] if said else _name(code - 128)


def _name(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return ""
