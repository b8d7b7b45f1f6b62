"""The error of the last run that was predicted with a measured hardware file, in a file beside it.

The file names the measurements by their checksum: an error counts until they are replaced. It is renamed into place
whole, so that of several runs which end at once, the last one's error stays.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hvdlm.errors import HvdlmError
from hvdlm.io import atomic_files, untrusted_input
from hvdlm.io.value_checks import fields, number, text

LARGEST_ERROR = 0.10
"""Relative error of the last predicted seconds a step above which measurements are not used for advice."""

LEAST_BLOCKS = 10
"""Fewest steady steps (rounds, with local SGD) of a run whose error is written back."""

_LIMIT = 2**16  # bytes
_CHECK = fields({"hardware_sha256": text, "error": number(), "run": text})


def path_of(hardware: Path) -> Path:
    """Return the file of the last error beside a hardware file."""
    return hardware.with_name(f"{hardware.stem}.last_error.json")


def write(hardware: Path, checksum: str, figures: Mapping[str, Any], run: str) -> None:
    """Write the error of a run, unless the measurements were replaced while it ran.

    Args:
        hardware: the hardware file that the run was predicted with.
        checksum: its SHA-256 at that time.
        figures: the run's ``step_seconds`` of summary.json.
        run: its folder.

    Raises:
        OSError: it can't be written.
    """
    if atomic_files.sha256(hardware) == checksum:
        grade = {"hardware_sha256": checksum, "run": run, "unix_time": int(time.time()), **figures}
        atomic_files.replace(path_of(hardware), json.dumps(grade, indent=1) + "\n")


def last_error(hardware: Path) -> tuple[float, str] | None:
    """Return the relative error of the last run that was predicted with these measurements, and the run's folder.

    None where there is none: a damaged file is as good as none.
    """
    try:
        grade = untrusted_input.read_json(path_of(hardware), _LIMIT)
        _CHECK(grade, "")
        if grade["hardware_sha256"] != atomic_files.sha256(hardware):
            return None
        return float(grade["error"]), str(grade["run"])
    except (OSError, ValueError):
        return None


def check(hardware: Path) -> None:
    """Check that the last run was predicted well enough with these measurements to advise by them.

    Raises:
        HvdlmError: its seconds a step were wrong by more than 10%.
    """
    last = last_error(hardware)
    if last and abs(last[0]) > LARGEST_ERROR:
        error, run = last
        raise HvdlmError(
            f"{hardware}: the seconds a step of the last run that they were predicted for "
            f"({untrusted_input.shown(run)}) were predicted {deviation(error)}, and by measurements with an error above "
            f"{LARGEST_ERROR:.0%} nothing is advised: measure this machine anew (python -m hvdlm plan --measure)."
        )


def deviation(error: float) -> str:
    """Return a relative error as text: 12.3% too high."""
    return f"{abs(error):.1%} too {'low' if error < 0 else 'high'}"
