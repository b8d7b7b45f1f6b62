"""The lock on writing a token folder: one process writes, the others wait for it and report which process that is."""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from hvdlm.data.progress_bar import print_line
from hvdlm.diagnostics.phases import READING, process
from hvdlm.errors import HvdlmError
from hvdlm.io import launcher_env

_POLL_SECONDS = 0.2
_FIRST_SECONDS, _NEXT_SECONDS = 5.0, 60.0  # until the first and between two later reports while waiting
_MAX_BYTES = 4096


@contextmanager
def writer_lock(path: Path) -> Iterator[None]:
    """Wait for and hold the lock ``path``, whose modification time shows that its holder makes progress.

    Raises:
        HvdlmError: the holder has made no progress for too long.
        OSError: the lock can't be opened.
    """
    with path.open("a+", encoding="utf-8", errors="replace") as file:
        with process.during("waiting for another process to write the token folder", patience=float("inf")):
            _wait(file, path)
        file.truncate(0)
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        file.write(json.dumps({**holder, "launch": _launch()}))
        file.flush()
        with process.touching(path):
            yield


def _wait(file: TextIO, path: Path) -> None:
    """Wait for the lock; times are counted in polls, since a clock continues while a process is suspended."""
    waited = idle = 0.0
    modified, report_after = 0, _FIRST_SECONDS
    while not _acquired(file):
        time.sleep(_POLL_SECONDS)
        waited += _POLL_SECONDS
        new = os.fstat(file.fileno()).st_mtime_ns
        idle = idle + _POLL_SECONDS if new == modified else 0.0
        modified = new
        if idle > READING * process.timeout:
            raise HvdlmError(
                f"the lock {path} has been held for {waited:.0f} s by {_describe(file)}, without progress for "
                f"{idle:.0f} s (limit: {READING:g} times --communication.timeout): end that process, or choose "
                "another folder (--data.cache FOLDER)."
            )
        if waited > report_after:
            report_after += _NEXT_SECONDS
            if _holder(file).get("launch") != _launch() and launcher_env.local_rank_for_messages() == 0:
                so_far = f"{waited:.0f} s so far"
                print_line(f"hvdlm: waiting for {_describe(file)} to write the token folder, {so_far} ({path})")


def _acquired(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _launch() -> str:
    """Return what the ranks of this launch have in common, whose waiting for each other is not reported."""
    return launcher_env.attempt() if launcher_env.started_by_launcher() else ""


def _holder(file: TextIO) -> dict[str, Any]:
    """Return what the holder has written about itself, nothing where it has not."""
    try:
        file.seek(0)
        holder = json.loads(file.read(_MAX_BYTES))
        return {key: str(holder[key])[:100] for key in ("pid", "host", "since", "launch")}
    except (ValueError, TypeError, KeyError):
        return {}


def _describe(file: TextIO) -> str:
    """Return who holds the lock: as it has written, else as this host's kernel says."""
    holder = {key: re.sub(r"[^\w .:-]", "?", value) for key, value in _holder(file).items()}
    pid = holder.get("pid") or _pid_of_holder(os.fstat(file.fileno()).st_ino)
    if not pid:
        return "another process"
    if not holder:
        return f"process {pid}"
    return f"process {pid} on {holder['host']} (since {holder['since']})"


def _pid_of_holder(inode: int) -> str:
    """Return the process that holds a lock on a file of this host, "" where it is not known."""
    try:
        locks = Path("/proc/locks").read_text(encoding="ascii")
    except OSError:
        return ""
    match = re.search(rf"FLOCK +ADVISORY +WRITE (\d+) \S+:{inode} ", locks)
    return match[1] if match else ""
