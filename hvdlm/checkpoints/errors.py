"""The error of a checkpoint that can't be read."""

from __future__ import annotations

from pathlib import Path

from hvdlm.errors import HvdlmError


class CheckpointError(HvdlmError):
    """A checkpoint that can't be read.

    Attributes:
        path: its folder.
        reason: what is wrong with it, without the path and without advice.
        kind: "missing" where there is no manifest, else "damaged".
    """

    def __init__(self, path: Path, reason: str, kind: str = "damaged") -> None:
        if kind == "missing":
            sentence = f"{path} is no hvdlm checkpoint: {reason}. Name a folder like RUN/checkpoints/step-..."
        else:
            sentence = f"checkpoint {path} is damaged or foreign: {reason}. Resume from another one."
        super().__init__(sentence)
        self.path = path
        self.reason = reason
        self.kind = kind
