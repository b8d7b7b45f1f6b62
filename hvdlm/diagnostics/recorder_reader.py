"""Reads ledgers of collectives (``hvdlm.diagnostics.flight_recorder``), which may be cut off, damaged or hostile."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from hvdlm.diagnostics.flight_recorder import FIRST, HEADER, IN_GRAPH, MAGIC, RECORD, WHAT
from hvdlm.errors import HvdlmError

_MOST_BYTES = FIRST + 65536 * RECORD.size


@dataclass(frozen=True)
class Entry:
    """One collective of one rank. Times are seconds since the epoch; ``ended`` 0: under way.

    Attributes:
        sequence: its number among all collectives of the rank, from 1.
        place: its number among those of its group, from 0.
        ranks: the group's, as ``ranks_text`` writes them.
        site: file and line where it was called; of a graph's, when the graph was traced.
        in_graph: begun and ended with a whole TensorFlow graph.
    """

    sequence: int
    place: int
    step: int
    begun: float
    ended: float
    operation: str
    name: str
    ranks: str
    shape: str = ""
    dtype: str = ""
    site: str = ""
    in_graph: bool = False


@dataclass(frozen=True)
class LedgerView:
    """What a ledger's file says. ``heartbeat``: seconds since the epoch; ``entries``: by sequence, the oldest first."""

    rank: int
    size: int
    pid: int
    host: str
    step: int
    heartbeat: float
    entries: tuple[Entry, ...]


def read_recorder(path: Path) -> LedgerView:
    """Return what is in a ledger's file.

    Raises:
        HvdlmError: it can't be read, or is no ledger.
    """
    try:
        data = _content(path)
    except OSError as error:
        raise HvdlmError(f"{path}: {error.strerror}: it can't be read as a ledger of collectives.") from error
    if len(data) < FIRST or data[:8] != MAGIC:
        raise HvdlmError(f"{path}: is no ledger of collectives: delete it.")
    _, width, count, rank, size, pid, step, heartbeat, host = HEADER.unpack_from(data)
    if width != RECORD.size or len(data) != FIRST + count * RECORD.size or not rank < size <= 65536:
        raise HvdlmError(f"{path}: is damaged, or was cut off: its header doesn't fit its size.")
    found = [entry for slot in range(count) if (entry := _entry(data, slot, count))]
    entries = tuple(sorted(found, key=lambda entry: entry.sequence))
    # What is left of a round that newer records have overwritten in part is no gap of this rank's.
    latest = entries[-1].sequence if entries else 0
    entries = tuple(entry for entry in entries if entry.sequence > latest - count)
    return LedgerView(rank, size, pid, _text(host), step, _seconds(heartbeat), entries)


def _content(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size > _MOST_BYTES:
            raise OSError(0, "is no plain file of a ledger's size")
        return file.read(_MOST_BYTES)


def _entry(data: bytes, slot: int, count: int) -> Entry | None:
    number, place, step, begun, ended, flags, what = RECORD.unpack_from(data, FIRST + slot * RECORD.size)
    if number == 0 or (number - 1) % count != slot:
        return None
    texts = [_text(part) for part in WHAT.unpack(what)]
    operation, name, ranks, shape, dtype, site = texts
    known = (number, place, step, _seconds(begun), _seconds(ended), operation, name, ranks)
    return Entry(*known, shape, dtype, site, bool(flags & IN_GRAPH))


def _text(data: bytes) -> str:
    """Return printable text: what a terminal obeys is left out."""
    text = data.split(b"\0")[0].decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "?" for c in text)


def _seconds(value: float) -> float:
    return value if 0.0 <= value < 1e11 else 0.0
