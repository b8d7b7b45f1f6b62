"""Writes files that survive a crash: synced to disk, renamed to their final name when whole."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
from pathlib import Path
from typing import BinaryIO

from hvdlm.io import safe_files

_CHUNK = 2**20  # bytes; a larger buffer would be allocated even for the smallest untrusted file


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until its content is on disk."""
    with safe_files.create(path) as file:
        file.write(data)
        sync(file)


def sync(file: BinaryIO) -> None:
    """Wait until everything written to an open file is on disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until all creations, renames and deletions in a folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def replace(path: Path, text: str) -> None:
    """Write a small file atomically: under a temporary name, synced, then renamed."""
    temporary = temporary_name(path)
    try:
        write_synced(temporary, text.encode())
        safe_files.move(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            safe_files.delete_file(temporary)


def temporary_name(path: Path) -> Path:
    """Return a new name beside ``path``: other processes that write the same file have others."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def overwrite(path: Path, text: str) -> None:
    """Write a small file over an existing one of similar length, which a full disk allows; not atomic."""
    descriptor = safe_files.open_regular(path, os.O_WRONLY)
    try:
        data = text.encode()
        if os.pwrite(descriptor, data, 0) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.ftruncate(descriptor, len(data))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
