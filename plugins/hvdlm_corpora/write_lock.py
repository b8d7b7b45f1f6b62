"""The lock on writing a token folder: one process writes, others wait while it is alive."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hvdlm.diagnostics.phases import process
from hvdlm.errors import HvdlmError
from hvdlm.io import file_lock, launcher_env
from hvdlm.io.file_lock import FileLock, Held
from hvdlm_corpora.progress_bar import print_line

SILENT_BEATS = 5
"""Touches of a lock that its owner may miss, at least."""


@contextmanager
def writing(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock on writing ``path``.

    Args:
        path: the token folder or tokenizer.
        wait: whether to wait for another process that writes it, as in the cache; else it is an error.

    Raises:
        HvdlmError: another process writes it, or shows no sign of life; or an OSError in the block.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _wait_for(path) if wait else file_lock.exclusive(path):
            yield
    except OSError as error:
        file = f" ({error.filename})" if isinstance(error.filename, str) else ""  # perhaps the lock
        raise HvdlmError(
            f"the token files can't be written to {path}: {error.strerror or error}{file}"
            ": free space or choose another folder (--data.cache FOLDER)."
        ) from error


def _wait_for(path: Path) -> FileLock:
    """Wait for the lock, and take it; the ranks of one launch wait silently.

    Raises:
        HvdlmError: its owner shows no sign of life for too long.
    """
    lock, patience = file_lock.beside(path), max(SILENT_BEATS * file_lock.BEAT, process.timeout)
    launch = launcher_env.launch_identity()
    try:
        with process.during("waiting for another process to write the token folder", patience=math.inf):
            return file_lock.acquire(lock, wait=True, launch=launch, shared=False, say=_say, patience=patience)
    except Held as held:
        raise HvdlmError(
            f"the lock {lock} is held by {held.owner or 'another process'}, which has shown no sign of life for "
            f"{patience:.0f} s (limit: --communication.timeout): end that process, or choose another folder "
            "(--data.cache FOLDER)."
        ) from None


def _say(line: str) -> None:
    if launcher_env.local_rank_for_messages() == 0:
        print_line(f"hvdlm: {line}")
