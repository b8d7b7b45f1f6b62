"""The lock of a run's folder: one run at a time writes it."""

from __future__ import annotations

import atexit
from pathlib import Path

from hvdlm.errors import HvdlmError
from hvdlm.io import file_lock, launcher_env, safe_files
from hvdlm.io.file_lock import FileLock, Held

NAME = ".lock"
"""The lock's name in the folder."""


def hold(folder: Path, rank: int, local_rank: int) -> FileLock | None:
    """Take the lock of ``folder``, until it is released or this process ends; None where another rank takes it.

    The first rank of every node takes it, since every node may have a folder of its own; where they share one, so do
    they the lock.

    Raises:
        HvdlmError: another run is writing the folder, or it can't be written.
    """
    launch = launcher_env.launch_identity()
    if local_rank or (rank and not launch):
        if launch:  # nothing is written into the folder before
            file_lock.wait_for_launch(folder / NAME, launch)
        return None
    made: list[Path] = []
    try:
        made += [path for path in (folder, *folder.parents) if safe_files.kind(path) is None]
        folder.mkdir(parents=True, exist_ok=True)
        lock = file_lock.acquire(folder / NAME, launch=launch, job=launcher_env.scheduler_job())
    except Held as held:
        raise HvdlmError(
            f"{folder} is being written by another run, {held.owner or 'which is just starting'}: wait until it has "
            "ended, stop it, or name another folder (--log.run NAME)."
        ) from None
    except OSError as error:
        for path in made:
            safe_files.delete_if_empty(path)
        raise unwritable(folder, error) from error
    lock.made = made
    atexit.register(lock.release)
    return lock


def unwritable(folder: Path, error: OSError) -> HvdlmError:
    """Return the error of a run whose folder can't be written."""
    return HvdlmError(
        f"log.run {folder} can't be written: {error.strerror}: free space or choose another folder (--log.run)."
    )
