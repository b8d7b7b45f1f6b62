"""What a person looks at as it comes, and how figures are written there."""

from __future__ import annotations

import os
import sys
from typing import TextIO


def on_terminal(stream: TextIO | None = None) -> bool:
    """Return whether a person looks at ``stream`` (None: standard output): launchers give every rank a terminal.

    What they pass on from it may end in a file, and ``horovodrun`` puts the rank's number before every write.
    """
    launched = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "HOROVOD_SIZE", "SLURM_STEP_NUM_TASKS")
    return (stream or sys.stdout).isatty() and not any(name in os.environ for name in launched)


def size(count: float) -> str:
    """Return a number of bytes in the unit that leaves few digits."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def clock(seconds: float) -> str:
    """Return a duration as minutes:seconds, or hours:minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
