"""Errors that end a command with one sentence, and the exit codes of all commands."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

FAILED = 1
"""Exit code of a run that failed while computing."""

BAD_INPUT = 2
"""Exit code of a command that was refused before any rank computed."""

STOPPED = 75
"""Exit code of a run that was asked to stop and has saved (EX_TEMPFAIL): schedulers may queue it again."""

_LISTED = 24  # names in a sentence


class HvdlmError(Exception):
    """Bad input or a machine that lacks something: one sentence with what, where and what to do. Exit code 2."""


class RankError(Exception):
    """A failure while ranks were computing, with a sentence that names the rank. Exit code 1."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence on an unknown name: the closest known name, then all, unless there are many."""
    names = sorted(known)
    close, listed = difflib.get_close_matches(name, names, 1), ", ".join(names[:_LISTED])
    listed += f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    few = f" Known: {listed}." if len(names) <= 16 else ""
    return f"did you mean {close[0]}?{few}" if close else f"known: {listed}."
