"""Reads untrusted files: regular ones only, with bounds on size and memory, never through links out of their folder.

All errors are ValueErrors and OSErrors that say what is wrong; the reader of a format adds where, and what to do.
"""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from hvdlm.errors import HvdlmError
from hvdlm.io import text_decoding

FACTOR = 10
"""Memory that reading may take, as a multiple of the file's size, in addition to the slack that a reader states."""

SLACK = 2**20
_SHOWN = 80  # characters
# Punctuation inside of a string is no structure. One that isn't closed ends with the text, so that a search is linear.
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_SOME_STRINGS = re.compile(rf"(?:[^\"]*{_STRING.pattern}){{1,1000}}", re.DOTALL)
Value = TypeVar("Value")


def size(path: Path, within: Path | None = None) -> int:
    """Return the size of the regular file ``path``, which may not be a link to a file outside of the folder ``within``.

    Raises:
        ValueError, OSError: it is not a regular file, or missing.
    """
    if within is not None and path.is_symlink():
        inside(path, within)
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path.name} is not a regular file")
    return status.st_size


def inside(path: Path, folder: Path) -> None:
    """Check that ``path``, with links resolved, is in ``folder``.

    Raises:
        ValueError: it doesn't.
    """
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"{path.name} is a symbolic link that leads out of its folder")


def read(path: Path, limit: int, within: Path | None = None) -> bytes:
    """Return the content of the regular file ``path``, at most ``limit`` bytes.

    Raises:
        ValueError, OSError: it is larger, not a regular file, or missing.
    """
    if (count := size(path, within)) > limit:
        raise ValueError(f"{path.name} is larger than {limit:,} bytes")
    with path.open("rb") as file:
        return file.read(count)


def read_json(path: Path, limit: int, within: Path | None = None, slack: int = SLACK) -> Any:
    """Return the value of a JSON file of at most ``limit`` bytes; ``FACTOR`` and ``slack`` bound its memory.

    Raises:
        ValueError, OSError: it can't be read, isn't JSON, nests too deeply, or would take too much memory.
    """
    return parse_json(text_decoding.decode(read(path, limit, within)), slack)


def parse_json(text: str, slack: int = SLACK) -> Any:
    """Return the value of JSON ``text``.

    Raises:
        ValueError: it isn't JSON, nests too deeply, or would take too much memory.
    """
    if not _fits(text, _values(text), slack) and not _fits(text, _values_outside_strings(text), slack):
        raise ValueError("its JSON holds too many small values")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None


def _values_outside_strings(text: str) -> int:
    """Return the same bound without the characters inside of strings, some strings at a time to save memory."""
    values, position = 0, 0
    while match := _SOME_STRINGS.match(text, position):
        values += _values(_STRING.sub("", match[0]))
        position = match.end()
    return values + _values(text[position:])


def _values(text: str) -> int:
    """Return an upper bound of CPython's memory for the values that the characters of ``text`` start or separate.

    Without a check, ``[],[],...`` would take 25 times its size.
    """
    prices = {"[": 78, "{": 50, ",": 54, ":": 80}
    return sum(price * text.count(character) for character, price in prices.items())


def _fits(text: str, values: int, slack: int) -> bool:
    return 2 * sys.getsizeof(text) + values <= FACTOR * len(text) + slack


def shown(value: object, limit: int = _SHOWN) -> str:
    """Return ``value`` for a message: one line of printable characters, truncated to ``limit``."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except (RecursionError, ValueError):  # nested deeply, or an integer of thousands of digits
        text = f"a {type(value).__name__}"
    line = "".join(c if c.isprintable() else " " for c in text[: limit + 1])
    line = " ".join(line.split())
    return line if len(line) <= limit else f"{line[:limit]}..."


def guarded(action: Callable[[], Value]) -> Value:
    """Return the result of ``action``, a call of a compiled library, with its errors and panics as ValueErrors.

    Raises:
        ValueError: the library raised anything.
    """
    try:
        return action()
    except (KeyboardInterrupt, SystemExit, MemoryError, HvdlmError):
        raise
    except BaseException as error:  # a Rust panic is not an Exception
        raise ValueError(shown(str(error) or type(error).__name__, 200)) from error
