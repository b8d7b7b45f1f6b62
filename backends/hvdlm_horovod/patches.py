"""Applies the edits that Horovod 0.28.1 (June 2023) needs to build and run with current frameworks.

Each edit is one literal replacement in one file, with its reason. An edit whose text is not found stops the build: a
silent miss would surface as a compiler error an hour later. Delete an edit when a Horovod release makes it unnecessary.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from hvdlm_horovod import (
    bfloat16_edits,
    coding_edits,
    launcher_edits,
    performance_edits,
    portability_edits,
    ring_edits,
    waiting_edits,
)

VERSION = "0.28.1"
EDITS = portability_edits.EDITS + launcher_edits.EDITS + performance_edits.EDITS + bfloat16_edits.EDITS
EDITS += waiting_edits.EDITS + coding_edits.EDITS + ring_edits.EDITS


def digest() -> str:
    """Return a short hash of all edits: part of the key of the wheel cache."""
    return hashlib.sha256(repr((VERSION, EDITS)).encode()).hexdigest()[:12]


def apply(source: Path) -> None:
    """Apply every edit to the unpacked source distribution in ``source``.

    Raises:
        SystemExit: an edit's text does not occur exactly once in its file.
    """
    for edit in EDITS:
        path = source / edit.file
        text = path.read_text(encoding="utf-8")
        if text.count(edit.old) != 1:
            raise SystemExit(
                f"setup: cannot patch Horovod {VERSION}: {edit.file} holds {edit.old!r} {text.count(edit.old)} times, "
                "expected once. Is the source distribution the released one?"
            )
        path.write_text(text.replace(edit.old, edit.new), encoding="utf-8")
