"""Finds checkpoints on disk: a run's step folders, its newest step, and the checkpoint that an option names."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from pathlib import Path

from hvdlm.checkpoints.errors import CheckpointError
from hvdlm.checkpoints.load import Checkpoint, open_checkpoint
from hvdlm.checkpoints.manifest import MANIFEST
from hvdlm.errors import HvdlmError
from hvdlm.io.terminal import printable

STEP_PATTERN = r"step-\d{8,15}"
"""Matches the name of a checkpoint's folder."""


def step_name(step: int) -> str:
    """Return the folder name of the checkpoint of ``step``."""
    return f"step-{step:08d}"


def step_folders(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of all step folders in ``folder``, the newest first; nothing where it doesn't exist."""
    try:
        paths = [path for path in folder.iterdir() if re.fullmatch(STEP_PATTERN, path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(((int(path.name.removeprefix("step-")), path) for path in paths), reverse=True)


def newest_step(run: Path) -> tuple[int, os.stat_result] | None:
    """Return the step of a run's newest checkpoint that has a manifest, and that manifest's stat; None without one.

    Nothing is opened, so that a supervisor can ask often.
    """
    with contextlib.suppress(OSError):
        for step, path in step_folders(run / "checkpoints"):
            with contextlib.suppress(OSError):
                return step, (path / MANIFEST).stat()
    return None


def locate(run: Path, which: str) -> tuple[Path, str | None]:
    """Return the folder in which to look for the checkpoint ``which``, and its name there; None: the newest.

    Args:
        run: the folder of the present run.
        which: auto (the newest of ``run``), the path of another run, or that of a checkpoint.
    """
    if which == "auto":
        return run / "checkpoints", None
    path = Path(which)
    return (path / "checkpoints", None) if (path / "checkpoints").is_dir() else (path.parent, path.name)


def find(run: Path, which: str, warn: bool = True) -> Checkpoint | None:
    """Return the checkpoint that ``checkpoint.resume`` names, as one process sees it; None where there is none.

    Damaged ones are skipped, with a line on stderr where ``warn``. Several ranks use ``agreement.choose`` instead.

    Raises:
        HvdlmError: the checkpoint that is named can't be read, or all are damaged.
    """
    if which == "none":
        return None
    folder, name = locate(run, which)
    if name is not None:
        return open_checkpoint(Path(which))
    newest_error = None
    for _, path in step_folders(folder):
        try:
            return open_checkpoint(path)
        except CheckpointError as error:
            newest_error = newest_error or error
            if warn:
                print_skipped(error)
    require_none(folder, which, newest_error)
    return None


def require_none(folder: Path, which: str, newest_error: CheckpointError | None) -> None:
    """Check that a run may start without a checkpoint, after none of those in ``folder`` could be used.

    Raises:
        HvdlmError: all are damaged (``newest_error``: what is wrong with the newest), or another run was named.
    """
    if newest_error:
        raise HvdlmError(
            f"{folder} holds damaged checkpoints only, the newest because {newest_error.reason}: copy a whole one "
            "there, or start from scratch with --checkpoint.resume none --log.overwrite true."
        )
    if which != "auto":
        raise HvdlmError(f"{which} holds no checkpoint yet: train first, or name another run or checkpoint folder.")


def print_skipped(error: CheckpointError) -> None:
    """Print that a damaged checkpoint is skipped."""
    text = f"hvdlm: checkpoint {error.path} is damaged ({error.reason}): it is skipped"
    print(printable(text), file=sys.stderr, flush=True)
