"""Creates, appends to and deletes files without following links: nothing that hvdlm did not write is lost.

No other module deletes anything (a test checks it). Standard library only: ``make setup`` imports it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
from pathlib import Path
from typing import BinaryIO, TextIO

from hvdlm.errors import HvdlmError

_KINDS = {
    stat.S_IFDIR: "folder",
    stat.S_IFLNK: "symbolic link",
    stat.S_IFIFO: "named pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
    stat.S_IFREG: "file",
}


def kind(path: Path) -> str | None:
    """Return what ``path`` itself is: "file", "folder", "symbolic link", ...; None where there is nothing.

    Raises:
        OSError: its folder can't be searched.
    """
    try:
        return _KINDS.get(stat.S_IFMT(path.lstat().st_mode), "special file")
    except (FileNotFoundError, NotADirectoryError):
        return None


def create(path: Path) -> BinaryIO:
    """Open a new file for writing, in place of what an interrupted process left under this name.

    A link is removed, what it leads to stays.

    Raises:
        OSError: the name belongs to something else than a file or a link, or can't be written.
    """
    delete_file(path)
    return path.open("xb")  # fails where another process creates the name first, link or not


def append(path: Path) -> TextIO:
    """Open a regular file of UTF-8 text for appending, created where it is missing.

    Raises:
        OSError: it is a link or no regular file, or can't be written.
    """
    return os.fdopen(open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "a", encoding="utf-8")


def open_regular(path: Path, flags: int) -> int:
    """Return a descriptor of a regular file, opened with ``flags``; never waits for a pipe, never follows a link.

    Raises:
        OSError: it is a link or no regular file, or can't be opened.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a symbolic link", str(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return descriptor


def move(temporary: Path, path: Path) -> None:
    """Rename a file to its final name, in place of a file or a link of that name.

    Raises:
        OSError: the name belongs to a device or something else, or can't be written.
    """
    _require_file(path)
    os.replace(temporary, path)


def delete_file(path: Path) -> None:
    """Delete a regular file or a link, not what it leads to; nothing happens where there is none.

    Raises:
        OSError: it is something else, or can't be deleted.
    """
    _require_file(path)
    path.unlink(missing_ok=True)


def _require_file(path: Path) -> None:
    if (is_now := kind(path)) not in (None, "file", "symbolic link"):
        raise OSError(errno.EINVAL, f"it is a {is_now}, not a file", str(path))


def delete_folder(path: Path) -> None:
    """Delete a folder of hvdlm's own with all that it holds; a link is removed, what it leads to stays.

    Nothing happens where there is none; other processes may delete it at the same time.

    Raises:
        OSError: something in it can't be deleted.
    """
    if kind(path) != "folder":
        return delete_file(path)
    for _ in range(100):
        try:
            return shutil.rmtree(path)  # itself safe against folders that are replaced by links meanwhile
        except FileNotFoundError:
            if kind(path) is None:
                return None
    raise OSError(errno.EBUSY, "other processes keep changing it", str(path))


def delete_owned(folder: Path, names: str) -> None:
    """Delete the files and links in ``folder`` whose names match ``names`` (a pattern), and the folder if it is empty.

    Everything else stays, and so does what links lead to; where ``folder`` is a link, all stays.

    Raises:
        OSError: a file can't be deleted.
    """
    if kind(folder) != "folder":
        return
    for path in entries(folder):
        if re.fullmatch(names, path.name) and kind(path) in ("file", "symbolic link"):
            delete_file(path)
    delete_if_empty(folder)


def entries(folder: Path) -> list[Path]:
    """Return what a folder holds; nothing where another process has deleted it meanwhile.

    Raises:
        OSError: it can't be read.
    """
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []


def delete_if_empty(folder: Path) -> None:
    """Delete ``folder`` if it is an empty folder and can be deleted."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def check_output(path: Path, folder: bool = False) -> None:
    """Check, before any work, that ``--output`` names a regular file (or a folder) or nothing yet.

    Raises:
        HvdlmError: it doesn't, or what it names can't be examined.
    """
    expected = "folder" if folder else "file"
    try:
        is_now = kind(path)
    except OSError as error:
        raise HvdlmError(f"--output {path}: {error.strerror}: name a {expected} that can be written.") from error
    if is_now not in (None, expected):
        raise HvdlmError(f"--output {path}: it is a {is_now}, expected the name of a {expected}: name another one.")
