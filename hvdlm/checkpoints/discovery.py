"""Finds checkpoints on disk: a run's step folders, its newest step, and the checkpoint that an option names."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from hvdlm.checkpoints.errors import CheckpointError
from hvdlm.checkpoints.load import Checkpoint, open_checkpoint
from hvdlm.checkpoints.manifest import MANIFEST
from hvdlm.checkpoints.order import newest_first, sequence_numbers, set_aside_folders, step_of
from hvdlm.errors import HvdlmError
from hvdlm.io.terminal import printable


def step_folders(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of all step folders in ``folder``, the newest first; nothing where it doesn't exist."""
    return [(step_of(name), folder / name) for name in newest_first(sequence_numbers(folder))]


def newest_step(run: Path) -> tuple[int, int] | None:
    """Return the step of a run's newest checkpoint that has a manifest, and its sequence number; None without one.

    The sequence number is -1 where it can't be read. No other file is opened, so that a supervisor can ask often.
    """
    with contextlib.suppress(OSError):
        numbers = sequence_numbers(run / "checkpoints")
        for name in newest_first(numbers):
            if (run / "checkpoints" / name / MANIFEST).is_file():
                number = numbers[name]
                return step_of(name), -1 if number is None else number
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
    require_none(folder, which, newest_error, bool(set_aside_folders(folder)))
    return None


def require_none(folder: Path, which: str, newest_error: CheckpointError | None, set_aside: bool = False) -> None:
    """Check that a run may start without a checkpoint, after none of those in ``folder`` could be used.

    Raises:
        HvdlmError: all are damaged (``newest_error``: what is wrong with the newest) or ``set_aside``, or another run
            was named.
    """
    if newest_error:
        raise HvdlmError(
            f"{folder} holds damaged checkpoints only, the newest because {newest_error.reason}: copy a whole one "
            "there, or start from scratch with --checkpoint.resume none --log.overwrite true."
        )
    if set_aside:
        raise HvdlmError(
            f"all checkpoints in {folder} were set aside, when the run was resumed from elsewhere or started again: "
            "resume from one of them (--checkpoint.resume PATH), or start from scratch with --checkpoint.resume none "
            "--log.overwrite true."
        )
    if which != "auto":
        raise HvdlmError(f"{which} holds no checkpoint yet: train first, or name another run or checkpoint folder.")


def print_skipped(error: CheckpointError) -> None:
    """Print that a damaged checkpoint is skipped."""
    text = f"hvdlm: checkpoint {error.path} is damaged ({error.reason}): it is skipped"
    print(printable(text), file=sys.stderr, flush=True)
