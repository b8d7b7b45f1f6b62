"""What the core prints when ranks hang or fail: an implementation of ``hvdlm.protocols.diagnosis.Diagnosis``."""

from __future__ import annotations

from pathlib import Path

from hvdlm.diagnostics.failure_files import read_stacks
from hvdlm_diagnosis import diagnosis
from hvdlm_diagnosis.recorder_reader import read_files


def explain_hang(folder: Path, now: float) -> str | None:
    """Return which ranks wait for which; None: there are no recordings."""
    files = read_files(folder)
    return diagnosis.explain(files, now) if files.recordings else None


def explain_stacks(folder: Path) -> str:
    """Return where ranks are that are not connected yet."""
    return diagnosis.explain_stacks(read_stacks(folder))


def explain_refused(folder: Path, now: float) -> list[str]:
    """Return which ranks called different collectives, or are silent."""
    return diagnosis.explain_refused(read_files(folder), now)
