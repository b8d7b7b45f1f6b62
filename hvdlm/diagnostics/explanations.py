"""Finds what explains hangs and failures; the entry point group ``hvdlm.diagnosis``."""

from __future__ import annotations

import functools
import importlib.metadata
from pathlib import Path

from hvdlm.diagnostics import failure_files
from hvdlm.protocols.diagnosis import Diagnosis


class RawStacks:
    """Shows the stacks of all ranks as they are, where nothing is installed that reads flight recorders."""

    def explain_hang(self, folder: Path, now: float) -> str | None:
        """Return None: recordings are not read."""
        return None

    def explain_stacks(self, folder: Path) -> str:
        """Return every rank's stacks."""
        stacks = sorted(failure_files.read_stacks(folder).items())
        return "\n".join(f"Rank {rank} is in:\n{stack}" for rank, stack in stacks)

    def explain_refused(self, folder: Path, now: float) -> list[str]:
        """Return nothing: recordings are not read."""
        return []


@functools.cache
def diagnosis() -> Diagnosis:
    """Return the first that can be imported, else ``RawStacks``.

    The command calls it at its start: a file system that no longer responds would hold up an import during a hang.
    """
    for entry in importlib.metadata.entry_points(group="hvdlm.diagnosis"):
        try:
            loaded: Diagnosis = entry.load()
            return loaded
        except Exception:  # it may be a third party's; a run ends with its own message in any case
            continue
    return RawStacks()
