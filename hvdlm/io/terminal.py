"""Detects a terminal, makes text safe for it, and formats sizes and durations for people."""

from __future__ import annotations

import os
import sys
from typing import TextIO

from hvdlm.io import launcher_env

COLUMNS = "HVDLM_TERMINAL_COLUMNS"
"""Environment variable: the width of the terminal on which ``python -m hvdlm run`` shows the output of its ranks."""
_HARMLESS = "\n\t\u200c\u200d"  # and the joiners of Persian, Indic scripts and emoji


def on_terminal(stream: TextIO | None = None) -> bool:
    """Return whether ``stream`` (None: standard output) is a terminal, and no launcher has started this process.

    Launchers give every rank a terminal, but may redirect their own output to a file, and ``horovodrun`` prefixes every
    write with the rank's number; ``python -m hvdlm run`` knows better.
    """
    if launcher_env.started_by_launcher():
        return columns() is not None and stream in (None, sys.stdout)
    return (stream or sys.stdout).isatty()


def columns() -> int | None:
    """Return the width of the terminal that shows a rank's output; None where it has to be asked."""
    value = os.environ.get(COLUMNS, "")
    return int(value) if value.isdigit() and launcher_env.started_by_launcher() else None


def printable(text: object) -> str:
    """Return ``text`` with a question mark for all that a terminal would act upon; line ends and tabs stay.

    Everything that is printed of a file, of another program's output or of a plugin passes through here: control
    characters move the cursor, set the window's title or hide text, and bidirectional marks change its order.
    """
    line = str(text)
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() or c in _HARMLESS else "?" for c in line)


def size(count: float) -> str:
    """Format a number of bytes with three digits and a unit."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def clock(seconds: float) -> str:
    """Format a duration as minutes:seconds, or hours:minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
