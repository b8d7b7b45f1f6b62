"""By which hardware seconds are predicted, and whether its measurements are good enough to advise by."""

from __future__ import annotations

from pathlib import Path

from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.planning.hardware import Hardware, find_hardware, named_files, read_hardware
from hvdlm.planning.step_time import resolved
from hvdlm_planner import grades
from hvdlm_planner.measured_file import measured, measured_path


def known_hardware(named: str | None, config: Config) -> tuple[Path, Hardware] | None:
    """Return the hardware file of this name or path, or that of this machine.

    None where this machine was not measured for the framework and precision of ``config``.

    Raises:
        HvdlmError: there is no such file, or it is damaged.
    """
    if named is not None:
        path = find_hardware(named)
        return path, read_hardware(path)
    hardware = measured(config)
    return (measured_path(), hardware) if hardware else None


def refusal(path: Path, hardware: Hardware, config: Config) -> str | None:
    """Return why nothing is advised by these measurements; None: they are good enough, or figures of another kind."""
    try:
        if hardware.measured:
            grades.check(path, hardware, config.framework, resolved(config, hardware).train.precision)
    except HvdlmError as error:
        return str(error)
    return None


def hardware_for(named: str | None, config: Config) -> Hardware:
    """Return the hardware by which layouts are compared.

    Raises:
        HvdlmError: there is none, or its last error was too large.
    """
    known = known_hardware(named, config)
    if known is None:
        raise HvdlmError(
            "plan --search compares predicted seconds, and this machine was not measured: python -m hvdlm plan "
            f"--measure, or name hardware: --hardware {'|'.join(named_files())}."
        )
    if reason := refusal(*known, config):
        raise HvdlmError(reason)
    return known[1]
