"""Reads what ranks left in RUN/flight_recorder: recordings, which may be truncated, damaged or malicious."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from hvdlm.diagnostics.failure_files import Failure, files_of_ranks, rank_of, read_failures, read_stacks, read_text
from hvdlm.diagnostics.flight_recorder import CALL, FIRST, HEADER, IN_GRAPH, MAGIC, MOST_RANKS, RECORD, RECORDS
from hvdlm.errors import HvdlmError
from hvdlm.io.terminal import printable
from hvdlm.io.untrusted_input import shown

_MOST_BYTES = FIRST + RECORDS * RECORD.size
_MOST_STEPS = 2**53


@dataclass(frozen=True)
class Entry:
    """One collective of one rank. Times are seconds since the epoch; ``ended`` is 0 while it is in flight.

    Attributes:
        sequence: its number among all collectives of the rank, from 1.
        index: its number among the collectives of its group, from 0.
        ranks: the group's ranks, as ``ranks_text`` writes them.
        site: file and line of the call; for a graph's collective, those of the call that was traced.
        in_graph: whether it is recorded as begun and ended with a whole TensorFlow graph.
    """

    sequence: int
    index: int
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
class Recording:
    """The content of one rank's file; ``heartbeat``: seconds since the epoch; ``entries``: the oldest first."""

    rank: int
    size: int
    pid: int
    host: str
    step: int
    heartbeat: float
    entries: tuple[Entry, ...]


def read_recording(path: Path) -> Recording:
    """Return the content of a flight recorder's file.

    Raises:
        HvdlmError: it can't be read, or is no such file.
    """
    try:
        data = _content(path)
    except OSError as error:
        raise HvdlmError(f"{path}: {error.strerror}: it can't be read as a flight recorder's file.") from error
    if len(data) < FIRST or data[:8] != MAGIC:
        raise HvdlmError(f"{path}: is no flight recorder's file: delete it.")
    _, width, count, rank, size, pid, step, heartbeat, host = HEADER.unpack_from(data)
    if width != RECORD.size or len(data) != FIRST + count * RECORD.size or not rank < size <= MOST_RANKS:
        raise HvdlmError(f"{path}: is damaged or truncated: its size doesn't match its header.")
    valid = [entry for slot in range(count) if (entry := _entry(data, slot, count))]
    entries = tuple(sorted(valid, key=lambda entry: entry.sequence))
    # Older records that are not yet overwritten are left out: with gaps between them, they would look like differences.
    latest = entries[-1].sequence if entries else 0
    entries = tuple(entry for entry in entries if entry.sequence > latest - count)
    return Recording(rank, size, pid, _text(host), _step(step), _seconds(heartbeat), entries)


def _content(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_BYTES:
            raise OSError(0, "is no regular file of a flight recorder's size")
        return file.read(_MOST_BYTES)


def _entry(data: bytes, slot: int, count: int) -> Entry | None:
    """Return the record in ``slot``; None: it is empty, or its numbers can't be those of a collective."""
    number, index, step, begun, ended, flags, packed = RECORD.unpack_from(data, FIRST + slot * RECORD.size)
    if number == 0 or (number - 1) % count != slot or index >= number:
        return None
    operation, name, ranks, shape, dtype, site = (_text(field) for field in CALL.unpack(packed))
    times = (_seconds(begun), _seconds(ended))
    return Entry(number, index, _step(step), *times, operation, name, ranks, shape, dtype, site, bool(flags & IN_GRAPH))


def _text(data: bytes) -> str:
    """Return a field's text on one line, of printable characters."""
    return shown(data.split(b"\0")[0].decode("utf-8", "replace"))


def _step(value: int) -> int:
    return value if 0 <= value < _MOST_STEPS else 0


def _seconds(value: float) -> float:
    return value if 0.0 <= value < 1e11 else 0.0


@dataclass(frozen=True)
class FailureFiles:
    """The content of RUN/flight_recorder as far as this host can read it.

    Attributes:
        recordings: the flight recorder of each rank.
        stacks: the Python stacks of each rank that wrote them when a hang was noticed.
        failures: the error of each failed rank.
        unreadable: sentences about recordings that can't be read.
    """

    recordings: dict[int, Recording] = field(default_factory=dict)
    stacks: dict[int, str] = field(default_factory=dict)
    failures: dict[int, Failure] = field(default_factory=dict)
    unreadable: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """The number of ranks of the run."""
        return max((recording.size for recording in self.recordings.values()), default=0)


def read_files(folder: Path) -> FailureFiles:
    """Return the content of ``folder``; a file that can't be read becomes a sentence in ``unreadable``."""
    recordings, unreadable = {}, []
    for path in files_of_ranks(folder, "rank", "recorder"):
        try:
            recording = read_recording(path)
            if recording.rank != rank_of(path):
                raise HvdlmError(f"{path}: is damaged or renamed: it is of rank {recording.rank}.")
            recordings[recording.rank] = recording
        except HvdlmError as error:
            unreadable.append(printable(error))
    return FailureFiles(recordings, read_stacks(folder), read_failures(folder), tuple(unreadable))


def read_diagnosis(folder: Path) -> str:
    """Return why the last attempt of a run ended, as it was reported; "" where nothing was."""
    paths = [folder / "diagnosis.txt", *sorted(folder.glob("attempt-*/diagnosis.txt"))]
    return next(filter(None, map(read_text, paths)), "").strip()
