"""What explains hangs and failures of several ranks, from the files that they left in RUN/flight_recorder."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class Diagnosis(Protocol):
    """The object that an entry point of the group ``hvdlm.diagnosis`` names; a module may be one.

    Its functions are called while the run ends, some in a thread and with a time limit; what they return is printed.
    ``now``: seconds since the epoch.
    """

    def explain_hang(self, folder: Path, now: float) -> str | None:
        """Return which ranks wait in which collective, and where the others are; None: there are no recordings."""

    def explain_stacks(self, folder: Path) -> str:
        """Return where ranks are that have no recordings, from their stacks."""

    def explain_refused(self, folder: Path, now: float) -> list[str]:
        """Return lines about an error of the transport: ranks that called different collectives, or silent ones."""
