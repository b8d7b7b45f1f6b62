"""The order of a folder's checkpoints: the newest is the one that was written last, not that of the highest step.

A manifest has a sequence number, which is higher than those of all checkpoints that were in the folder when it was
written. Those of format 2, without one, are older than all others; among them, the file ``latest`` tells which was
written last.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hvdlm.checkpoints.manifest import FORMAT, FORMAT_2, LIMIT, MANIFEST
from hvdlm.io import untrusted_input

STEP_PATTERN = r"step-\d{8,15}"
"""Matches the name of a checkpoint's folder."""

SET_ASIDE_PATTERN = r"set-aside-[0-9a-f]{16}"
"""Matches the name of a folder of checkpoints that were set aside."""

LATEST = "latest"
LATEST_PARTIAL = f".{LATEST}.partial"
PENDING = "set-aside.json"
"""While checkpoints are being set aside: {"target": folder, "newest": name or null, "numbers": {name: sequence}}."""

_LIMIT_SEQUENCE = 2**52  # half of what a manifest may claim: a higher one leaves valid numbers for what follows
_NAME_BYTES = 64  # more than the name of a checkpoint's folder has

Numbers = dict[str, int | None]
"""Sequence numbers by name; None where the manifest can't be read."""


def step_name(step: int) -> str:
    """Return the folder name of the checkpoint of ``step``."""
    return f"step-{step:08d}"


def step_of(name: str) -> int:
    """Return the step that a checkpoint's folder name has; 0 for another name."""
    return int(name.removeprefix("step-")) if re.fullmatch(STEP_PATTERN, name) else 0


def sequence_numbers(folder: Path) -> Numbers:
    """Return the sequence numbers of the checkpoints in ``folder``; empty where it doesn't exist.

    Checkpoints that a killed run had begun to set aside are left out. Of format 2: 0, or -1 if written before the one
    that ``latest`` names.
    """
    try:
        names = [path.name for path in folder.iterdir() if re.fullmatch(STEP_PATTERN, path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    numbers = {name: sequence_number(folder / name) for name in names}
    leaving = pending(folder)
    numbers = {name: n for name, n in numbers.items() if name not in leaving or leaving[name] != n}
    latest = named_latest(folder)
    if numbers.get(latest) == 0:
        older = [name for name, n in numbers.items() if n == 0 and step_of(name) > step_of(latest)]
        numbers |= dict.fromkeys(older, -1)
    return numbers


def stored(number: int | None) -> int | None:
    """Return the sequence number that a checkpoint itself has (format 2: 0), given the one that orders it."""
    return number and max(number, 0)


def sequence_number(path: Path) -> int | None:
    """Return the sequence number of the checkpoint in ``path``; None where its manifest can't be read."""
    with contextlib.suppress(OSError):
        stat = (path / MANIFEST).stat()
        return _read_number(path, stat.st_mtime_ns, stat.st_ino, stat.st_size)
    return None


@functools.lru_cache(maxsize=1024)  # a manifest takes time to read, and is never changed
def _read_number(path: Path, *identity: int) -> int | None:
    try:
        manifest = untrusted_input.read_json(path / MANIFEST, LIMIT, within=path)
        number = {FORMAT: manifest.get("sequence"), FORMAT_2: 0}.get(manifest.get("format"))
    except (ValueError, TypeError, AttributeError, OSError):
        return None
    return number if type(number) is int and 0 <= number < _LIMIT_SEQUENCE else None


def newest_first(numbers: Mapping[str, int | None]) -> list[str]:
    """Return the names, the newest first. An unreadable one counts as written right after the step before it."""
    keys, before = {}, -2
    for name in sorted(numbers, key=lambda name: (step_of(name), name)):
        number = numbers[name]
        before = before if number is None else number
        keys[name] = (before, step_of(name), name)
    return sorted(keys, key=lambda name: keys[name], reverse=True)


def merged(nodes: Sequence[Numbers]) -> Numbers:
    """Return the highest sequence number of each name; None where no node can read the manifest."""
    numbers: Numbers = {}
    for name, number in (item for node in nodes for item in node.items()):
        known = numbers.get(name)
        numbers[name] = known if number is None or (known is not None and known >= number) else number
    return numbers


def pending(folder: Path) -> Numbers:
    """Return the checkpoints in ``folder`` that a killed run had begun to set aside, with their sequence numbers."""
    numbers = read_pending(folder).get("numbers")
    named = numbers.items() if isinstance(numbers, dict) else ()
    return {name: number for name, number in named if number is None or type(number) is int}


def set_aside_folders(folder: Path) -> list[Path]:
    """Return the folders in ``folder`` of checkpoints that were set aside."""
    try:
        return [path for path in sorted(folder.iterdir()) if re.fullmatch(SET_ASIDE_PATTERN, path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def read_pending(folder: Path) -> dict[str, Any]:
    """Return the content of ``PENDING``; empty where there is none."""
    try:
        content = untrusted_input.read_json(folder / PENDING, LIMIT, within=folder)
    except (ValueError, OSError):
        return {}
    return content if isinstance(content, dict) else {}


def named_latest(folder: Path) -> str:
    """Return the name of the checkpoint that ``latest`` names as the newest; empty where there is none.

    A run that was killed after it had published a checkpoint leaves its name in ``LATEST_PARTIAL``.
    """
    name = read_name(folder / LATEST_PARTIAL)
    published = re.fullmatch(STEP_PATTERN, name) and (folder / name).is_dir()
    return name if published and not (folder / f".{name}.partial").exists() else read_name(folder / LATEST)


def read_name(path: Path) -> str:
    """Return the text of a file that names a checkpoint; empty where there is none."""
    try:
        return str(untrusted_input.read(path, _NAME_BYTES, within=path.parent), "utf-8").strip()
    except (ValueError, OSError):
        return ""
