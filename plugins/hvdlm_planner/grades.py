"""The error of the last run that was predicted by measurements, in a file beside them for each framework and precision.

It names the measurements by a checksum, so that it counts until they are replaced. It is renamed into place whole: of
several runs that end at once, the last one's error stays.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hvdlm.errors import HvdlmError
from hvdlm.io import atomic_files, untrusted_input
from hvdlm.io.value_checks import fields, number, text
from hvdlm.planning.hardware import ANY, Hardware

LARGEST_ERROR = 0.10
"""Relative error of the last predicted seconds a step above which nothing is advised by the measurements."""

LEAST_BLOCKS = 10
"""Fewest steady steps (rounds, with local SGD) of a run whose error is kept."""

_LIMIT = 2**16  # bytes
_CHECK = fields({"measurements": text, "error": number(), "run": text})


def path_of(hardware_file: Path, framework: str, precision: str) -> Path:
    """Return the file of the last error beside a hardware file."""
    return hardware_file.with_name(f"{hardware_file.stem}.{framework}-{precision}.last_error.json")


def checksum(hardware: Hardware, framework: str, precision: str) -> str:
    """Return what changes when the rates or the collectives of a framework are measured anew."""
    rates = [r for r in hardware.rates if r.framework in (ANY, framework) and r.precision in (ANY, precision)]
    collectives = [c for c in hardware.collectives if c.framework in (ANY, framework)]
    return hashlib.sha256(repr((rates, collectives)).encode()).hexdigest()


def write(path: Path, measurements: str, figures: Mapping[str, Any], run: str) -> None:
    """Write the error of a run.

    Args:
        path: the file (``path_of``).
        measurements: the checksum of what the run was predicted by.
        figures: the run's ``step_seconds`` of summary.json.
        run: its folder.

    Raises:
        OSError: it can't be written.
    """
    grade = {"measurements": measurements, "run": run, "unix_time": int(time.time()), **figures}
    atomic_files.replace(path, json.dumps(grade, indent=1) + "\n")


def last_error(hardware_file: Path, hardware: Hardware, framework: str, precision: str) -> tuple[float, str] | None:
    """Return the relative error of the last run that was predicted by these measurements, and the run's folder.

    None where there is none: a damaged file is as good as none.
    """
    try:
        grade = untrusted_input.read_json(path_of(hardware_file, framework, precision), _LIMIT)
        _CHECK(grade, "")
    except (OSError, ValueError):
        return None
    if grade["measurements"] != checksum(hardware, framework, precision):
        return None
    return float(grade["error"]), str(grade["run"])


def check(hardware_file: Path, hardware: Hardware, framework: str, precision: str) -> None:
    """Check that the last run was predicted well enough by these measurements to advise by them.

    Raises:
        HvdlmError: its seconds a step were wrong by more than 10%.
    """
    last = last_error(hardware_file, hardware, framework, precision)
    if last and abs(last[0]) > LARGEST_ERROR:
        error, run = last
        raise HvdlmError(
            f"{hardware_file}: the seconds a step of the last run that they were predicted for "
            f"({untrusted_input.shown(run)}, {framework} in {precision}) were predicted {deviation(error)}, and by "
            f"measurements with an error above {LARGEST_ERROR:.0%} nothing is advised: measure this machine anew "
            "(python -m hvdlm plan --measure)."
        )


def deviation(error: float) -> str:
    """Return a relative error as text: 12.3% too high."""
    return f"{abs(error):.1%} too {'low' if error < 0 else 'high'}"
