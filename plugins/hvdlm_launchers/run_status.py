"""A run's progress and outcome, read from small files in its folder and from its standard error."""

from __future__ import annotations

import contextlib
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdlm.checkpoints.discovery import newest_step
from hvdlm.errors import STOPPED
from hvdlm.io import untrusted_input
from hvdlm.io.value_checks import count, fields, text
from hvdlm.training.signals import LAUNCHER_ENDS

CODES = {"done": 0, "failed": 1, "refused": 2, "stopped": STOPPED}
"""Exit code of each outcome. ``stopped``: the run has saved and can be resumed (EX_TEMPFAIL)."""

_NOTICED = re.compile(r"process rank (\d+) with PID \d+ on node (\S+) exited on signal (\d+)")
# When one rank dies, launchers send the others a signal: their message about it is not the cause.
_STOPPED_BY_SIGNAL = re.compile(rf"rank \d+: SIG[A-Z0-9]+: |{LAUNCHER_ENDS}")
_EXCEPTION = re.compile(r"(?:\[\S*>:?)?[\w.]*(?:Error|Exception)\b")
_STATUS_BYTES = 2**20  # hvdlm writes no larger status.json
_STATUS = fields({}, {"state": text, "step": count()})


@dataclass(frozen=True)
class RunStatus:
    """The state of a run as its folder shows it.

    Attributes:
        checkpoint: step of the newest checkpoint that has a manifest, or None.
        sequence: its sequence number, which is higher than those of all that were written before; -1 without one.
        status: content of ``status.json``; empty if there is none.
    """

    checkpoint: int | None
    sequence: int
    status: dict[str, Any]

    @classmethod
    def of(cls, folder: Path) -> RunStatus:
        """Read ``folder``, which need not exist."""
        status, newest = _status(folder / "status.json"), newest_step(folder)
        if newest is None:
            return cls(None, -1, status)
        return cls(*newest, status)

    @property
    def step(self) -> int:
        """The latest step that the newest checkpoint or ``status.json`` records."""
        return max(self.checkpoint or 0, self.status.get("step", 0))

    def __str__(self) -> str:
        """Return what a restart would resume from."""
        return "no checkpoint yet" if self.checkpoint is None else f"the checkpoint of step {self.checkpoint}"


def _status(path: Path) -> dict[str, Any]:
    try:
        content = untrusted_input.read_json(path, _STATUS_BYTES, slack=_STATUS_BYTES)
        _STATUS(content, "")
    except (OSError, ValueError):
        return {}
    return dict(content)


def outcome(code: int, status: dict[str, Any], errors: list[str]) -> tuple[str, str]:
    """Return how an attempt ended (a key of ``CODES``) and why.

    Args:
        code: the launcher's exit code.
        status: what the attempt wrote into status.json; empty if it wrote nothing.
        errors: the last lines of its standard error.
    """
    if code == 1:  # horovodrun --gloo hides a rank's code, but prints it
        printed = re.findall(r"^Exit code: (\d+)$", "\n".join(errors), re.M)
        code = int(printed[-1]) if printed else code
    state = status.get("state", "")
    if state not in CODES:
        # A run that ends in order writes how: if its status is still "running", rank 0 died, whatever the code.
        states = {value: name for name, value in CODES.items() if not (status and name == "done")}
        state, status = states.get(code, "failed"), {}
    reason = status.get("reason")
    if not reason and state in ("failed", "refused"):
        reason = _cause(code, errors)
    return state, str(reason or "")


def _cause(code: int, errors: list[str]) -> str:
    """Return the rank that mpirun saw die, else hvdlm's last message, else the last exception, else the signal."""
    matches = [_NOTICED.search(line) for line in errors]
    dead_ranks = [f"rank {match[1]} on {match[2]}: {_signal_name(int(match[3]))}" for match in matches if match]
    messages = [line.partition("hvdlm: ")[2] for line in errors if "hvdlm: " in line]
    messages = [message for message in messages if not _STOPPED_BY_SIGNAL.match(message)]
    exceptions = [line for line in errors if _EXCEPTION.match(line) and "Horovod detected" not in line]
    causes = dead_ranks or messages or exceptions
    return causes[-1][:500] if causes else _signal_name(code - 128)


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return ""
