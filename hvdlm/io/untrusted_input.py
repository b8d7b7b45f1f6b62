"""What was written elsewhere: read with bounds on size and memory, from regular files, never through links that stray.

All errors are ValueErrors and OSErrors that say what is wrong; the reader of a format says where, and what to do.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import stat
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from hvdlm.errors import HvdlmError

FACTOR = 10
"""What is read may take this many times its file's size in memory, beside what a reader states as its slack."""

SLACK = 2**20
RATIO = 100
"""What is unpacked may be this many times its file: text packs 3 to 5 times smaller, the most repetitive log 50."""

_UNPACKED = 1 << 26  # bytes below which no ratio is too large
_SHOWN = 80
Value = TypeVar("Value")


def size(path: Path, within: Path | None = None) -> int:
    """Return the bytes of the regular file ``path``, which may not be a link that leads out of the folder ``within``.

    Raises:
        ValueError, OSError: it is something else, or not there.
    """
    if within is not None and path.is_symlink():
        inside(path, within)
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path.name} is no regular file")
    return status.st_size


def inside(path: Path, folder: Path) -> None:
    """Check that ``path``, its links followed, lies in ``folder``.

    Raises:
        ValueError: it doesn't.
    """
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"{path.name} is a symbolic link that leads out of its folder")


def read(path: Path, limit: int, within: Path | None = None) -> bytes:
    """Return what is in the regular file ``path``, at most ``limit`` bytes.

    Raises:
        ValueError, OSError: it is larger or something else, or not there.
    """
    if (count := size(path, within)) > limit:
        raise ValueError(f"{path.name} is larger than {limit:,} bytes")
    with path.open("rb") as file:
        return file.read(count)


def read_json(path: Path, limit: int, within: Path | None = None, slack: int = SLACK) -> Any:
    """Return the value in a JSON file of at most ``limit`` bytes, its memory bounded by ``FACTOR`` and ``slack``.

    Raises:
        ValueError, OSError: it can't be read, is no JSON, too deep, or would take too much memory.
    """
    return parse_json(str(read(path, limit, within), "utf-8"), slack)


def unpacked_limit(path: str) -> int:
    """Return how many bytes the file ``path`` may unpack to."""
    return max(_UNPACKED, RATIO * os.path.getsize(path))


def read_unpacked(path: Path, limit: int) -> bytes:
    """Return what is in the regular file ``path``, unpacked where its name ends with .gz, at most ``limit`` bytes.

    Raises:
        ValueError, OSError: it is larger or something else, damaged, a decompression bomb, or not there.
    """
    data = read(path, limit)
    if path.suffix != ".gz":
        return data
    most = min(limit, unpacked_limit(str(path)))
    try:
        with gzip.open(io.BytesIO(data)) as file:
            data = file.read(most + 1)
    except (EOFError, zlib.error) as error:
        raise ValueError(f"{path.name} can't be unpacked ({error})") from error
    if len(data) > most:
        raise ValueError(f"{path.name} unpacks to more than {most:,} bytes")
    return data


def parse_json(text: str, slack: int = SLACK) -> Any:
    """Return the value of JSON ``text``.

    Raises:
        ValueError: it is no JSON, too deep, or would take too much memory.
    """
    # The most that CPython takes for what these characters begin or part: `[],[],...` would grow 25 times.
    parts = 78 * text.count("[") + 50 * text.count("{") + 54 * text.count(",") + 80 * text.count(":")
    if 2 * sys.getsizeof(text) + parts > FACTOR * len(text) + slack:
        raise ValueError("its JSON is made of too many too small parts")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None


def shown(value: object, limit: int = _SHOWN) -> str:
    """Return ``value`` for a message: one line of printable characters, at most ``limit`` and dots."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except (RecursionError, ValueError):  # nested deeply, or a whole number of thousands of digits
        text = f"a {type(value).__name__}"
    line = "".join(c if c.isprintable() else " " for c in text[: limit + 1])
    line = " ".join(line.split())
    return line if len(line) <= limit else f"{line[:limit]}..."


def guarded(action: Callable[[], Value]) -> Value:
    """Return what a compiled library's ``action`` returns; whatever it raises, panics too, becomes a ValueError.

    Raises:
        ValueError: it raised something.
    """
    try:
        return action()
    except (KeyboardInterrupt, SystemExit, MemoryError, HvdlmError):
        raise
    except BaseException as error:  # a panic of Rust is no Exception
        raise ValueError(shown(str(error) or type(error).__name__, 200)) from error
