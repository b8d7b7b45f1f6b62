"""A rank's flight recorder: its latest collectives, in a ring of fixed-size records that a file mirrors.

The file is read when ranks no longer respond (``recorder_reader``) and must hold what a rank recorded last: every
record is written when it is made, and survives the process. It isn't memory-mapped: if its file were truncated, the
rank would be killed by a signal.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
import struct
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import CodeType
from typing import Any, BinaryIO, NamedTuple

from hvdlm.errors import HvdlmError
from hvdlm.io import safe_files

MAGIC = b"hvdlmLG1"
RECORDS = 2048
HEADER = struct.Struct("<8sIIIIqqd64s")  # magic, bytes of a record, records, rank, size, pid, step, heartbeat, host
RECORD = struct.Struct("<QQqddQ208s")  # sequence, index in its group, step, begun, ended, flags, call
CALL = struct.Struct("<16s64s24s24s12s68s")  # operation, name, ranks, shape, dtype, call site
_ENDED = struct.Struct("<d")
_ALIVE = struct.Struct("<qd")  # step and heartbeat, within the header
_ENDED_AT, _ALIVE_AT = 32, 32
FIRST = 256
IN_GRAPH = 1
MOST_RANKS = 65536
"""No world is larger: a recording that says so is damaged."""

_RUNS = 32  # runs of ranks in a sentence, at most
_BYTES = FIRST + RECORDS * RECORD.size

_skipped_modules = [__name__, "contextlib", "functools"]


def skip_in_call_sites(*modules: str) -> None:
    """Skip frames of modules whose names begin with one of ``modules`` when a collective's call site is recorded.

    For modules that call collectives on behalf of others: they register themselves when they are imported.
    """
    _skipped_modules.extend(module for module in modules if module not in _skipped_modules)


class RecordedGroup:
    """A group in the flight recorder: its ranks as text, the index of its next collective, and its past calls."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.text = ranks_text(ranks)
        self.indices = itertools.count()
        self.calls: dict[tuple[str, str, bytes], Call] = {}


class Call(NamedTuple):
    """A collective as it is known before it begins: its group, its tensors' (shape, dtype), and its packed record."""

    group: RecordedGroup
    signature: list[tuple[Any, Any]]
    packed: bytes


def ranks_text(ranks: Sequence[int]) -> str:
    """Return the ranks as text: ``0-6/2`` for 0, 2, 4, 6 (groups of a mesh are at equal distances), ``0-2,5`` else."""
    ranks = list(ranks)
    step = ranks[1] - ranks[0] if len(ranks) > 1 else 0
    if step > 0 and ranks == list(range(ranks[0], ranks[-1] + 1, step)):
        return f"{ranks[0]}-{ranks[-1]}" + ("" if step == 1 else f"/{step}")
    runs = [[rank for _, rank in run] for _, run in itertools.groupby(enumerate(ranks), lambda pair: pair[1] - pair[0])]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def ranks_in(text: str) -> Sequence[int]:
    """Return the ranks that ``ranks_text`` wrote; none where the text is truncated or invalid."""
    try:
        runs = [_run(run) for run in text.split(",")]
        if len(runs) == 1:
            return runs[0]
        return tuple(itertools.chain.from_iterable(runs)) if sum(map(len, runs)) <= MOST_RANKS else ()
    except (ValueError, OverflowError):
        return ()


def _run(text: str) -> range:
    span, _, step = text.partition("/")
    first, _, last = span.partition("-")
    return range(int(first), int(last or first) + 1, int(step or 1))


def named_ranks(ranks: Iterable[int]) -> str:
    """Return the ranks for a sentence: ``rank 3``, ``ranks 0-2,5``, of many scattered ones the lowest."""
    ordered = sorted(ranks)
    if len(ordered) == 1:
        return f"rank {ordered[0]}"
    shown = ",".join(ranks_text(ordered).split(",")[:_RUNS])
    hidden = len(ordered) - len(ranks_in(shown))
    return f"ranks {shown}" + (f" and {hidden} more" if hidden else "")


_sites: dict[tuple[int, int], tuple[CodeType, bytes | None]] = {}


def _site() -> bytes:
    """Return ``folder/file.py:line`` of the nearest frame outside of the skipped modules."""
    frame = sys._getframe(2)
    while True:
        code = frame.f_code
        known = _sites.get((id(code), frame.f_lineno))
        if known is None:
            skipped = str(frame.f_globals.get("__name__", "")).startswith(tuple(_skipped_modules))
            line = "/".join(code.co_filename.split(os.sep)[-2:]) + f":{frame.f_lineno}"
            # The reference to the code object keeps its id from being reused.
            known = _sites[id(code), frame.f_lineno] = (code, None if skipped else line.encode()[-68:])
        if known[1] is not None or frame.f_back is None:
            return known[1] or b""
        frame = frame.f_back


def _shape(tensors: Sequence[Any]) -> tuple[str, str]:
    """Return the shape and the dtype of a collective's tensors as text."""
    if not tensors:
        return "", ""
    dtype = str(getattr(tensors[0].dtype, "name", tensors[0].dtype)).rpartition(".")[2]
    text = "[" + ",".join("?" if n is None else str(n) for n in tuple(tensors[0].shape)) + "]"
    return (text if len(tensors) == 1 else f"{len(tensors)} from {text}"), dtype


class FlightRecorder:
    """This rank's flight recorder of its latest ``RECORDS`` collectives; in memory until ``keep_in``.

    Attributes:
        folder: the folder of the file; None: in memory only.
        open: when each collective in flight outside of graphs began (``time.monotonic()``), by sequence number.
        last: ``time.monotonic()`` of the latest progress.
        current_step: the number given to ``step`` last.
        failing: whether this rank is reporting an error: the watchdog then ignores its lack of progress.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size
        self.folder: Path | None = None
        self.open: dict[int, float] = {}
        self.last = time.monotonic()
        self.failing = False
        self.current_step = 0
        self._sequence = itertools.count(1)
        self._latest = 0
        self._groups: dict[tuple[int, ...], RecordedGroup] = {}
        self._memory = bytearray(0)  # the content, until there is a file
        self._file: BinaryIO | None = None
        self._trace: list[tuple[Call, int]] | None = None

    def recorded_group(self, ranks: Sequence[int]) -> RecordedGroup:
        """Return the group of these ranks, for ``begin``."""
        key = tuple(ranks)
        return self._groups.setdefault(key, RecordedGroup(key))

    def begin(self, operation: str, name: str, group: RecordedGroup, tensors: Sequence[Any] = ()) -> int:
        """Record that a collective begins; return its sequence number for ``end``, or 0 while a graph is traced."""
        call = self._call(operation, name, group, tensors, _site())
        if self._trace is None:
            number = self._write(call, 0)
            self.open[number] = self.last
            return number
        self._trace.append((call, self._write(call, IN_GRAPH)))
        return 0

    def end(self, number: int) -> None:
        """Record that collective ``number`` has ended; 0 is ignored."""
        if self.open.pop(number, None) is not None:
            self.last = time.monotonic()
            self._write_end(number)

    @contextmanager
    def graph(self, calls: Sequence[Call]) -> Iterator[list[Call]]:
        """Record ``calls`` as begun now and as ended when the graph has run; yield the list of calls of its trace.

        ``calls`` are those that the graph's trace made: a later run of the graph executes no Python.
        """
        self.last = time.monotonic()
        begun = [self._write(call, IN_GRAPH) for call in calls]
        outer, self._trace = self._trace, []
        traced: list[Call] = []
        try:
            yield traced
            traced += [call for call, _ in self._trace]
            begun += [number for _, number in self._trace]
        finally:
            self._trace = outer
        for number in begun:
            self._write_end(number)
        self.last = time.monotonic()

    def _call(self, operation: str, name: str, group: RecordedGroup, tensors: Sequence[Any], site: bytes) -> Call:
        signature = [(tensor.shape, tensor.dtype) for tensor in tensors]
        key = (operation, name, site)
        call = group.calls.get(key)
        if call is None or call.signature != signature:
            if len(group.calls) > 4 * RECORDS:
                group.calls.clear()
            texts = (operation, name, group.text, *_shape(tensors))
            call = Call(group, signature, CALL.pack(*(text.encode() for text in texts), site))
            group.calls[key] = call
        return call

    def _write(self, call: Call, flags: int) -> int:
        """Write the record of a collective that begins; return its sequence number."""
        number = self._latest = next(self._sequence)
        self.last = time.monotonic()
        values = (number, next(call.group.indices), self.current_step, time.time(), 0.0, flags, call.packed)
        self._put(RECORD.pack(*values), _offset(number))
        return number

    def _write_end(self, number: int) -> None:
        if self._latest - number < RECORDS:
            self._put(_ENDED.pack(time.time()), _offset(number) + _ENDED_AT)

    def _put(self, content: bytes, offset: int) -> None:
        """Write to the file, or to memory where there is none; what can't be written is lost."""
        file = self._file
        if file is None:
            if not self._memory:
                self._memory = bytearray(_BYTES)
            self._memory[offset : offset + len(content)] = content
            return
        with contextlib.suppress(OSError):
            os.pwrite(file.fileno(), content, offset)

    def step(self, number: int) -> None:
        """Note that step ``number`` begins."""
        self.current_step = number
        self.beat()
        self.alive()

    def alive(self) -> None:
        """Note progress in work that is neither a step nor a collective."""
        self.last = time.monotonic()

    def open_since(self, now: float) -> float:
        """Return when the oldest collective in flight began; ``now`` if there is none."""
        return min(list(self.open.values()), default=now)

    def beat(self) -> None:
        """Write step and time into the header, as a sign that this rank's Python is running."""
        if self._file is not None:
            self._put(_ALIVE.pack(self.current_step, time.time()), _ALIVE_AT)

    def keep_in(self, folder: Path, rank: int) -> None:
        """Continue in the file ``folder/rank-0000.recorder``, or in memory where it can't be written."""
        self.rank = rank
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = _new_file(folder / f"rank-{rank:04d}.recorder")
            host = socket.gethostname().encode()[:64]
            header = (MAGIC, RECORD.size, RECORDS, rank, self.size, os.getpid(), self.current_step, time.time(), host)
            os.pwrite(file.fileno(), HEADER.pack(*header) + self._memory[HEADER.size :], 0)
        except OSError:
            return
        self._file, self.folder, self._memory = file, folder, bytearray(0)

    def flush(self) -> None:
        """Write the file to disk, so that ranks on other hosts see it."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def discard(self) -> None:
        """Delete this rank's files after a run has ended normally, and the folder when it is empty."""
        if self.folder is None:
            return
        with contextlib.suppress(OSError):  # the next attempt deletes them
            safe_files.delete_owned(self.folder, _names(f"{self.rank:04d}"))


def _offset(number: int) -> int:
    """Return the record of collective ``number`` as an offset in the file (bytes)."""
    return FIRST + (number - 1) % RECORDS * RECORD.size


def _new_file(path: Path) -> BinaryIO:
    """Return a new file; its space is allocated now, so that a full disk later costs no record."""
    safe_files.delete_file(path)
    file = path.open("xb", buffering=0)
    allocate = getattr(os, "posix_fallocate", lambda descriptor, _, size: os.ftruncate(descriptor, size))
    allocate(file.fileno(), 0, _BYTES)
    return file


def _names(rank: str = r"\d{4,5}") -> str:
    """Return a pattern of the names of the files that ``rank`` writes into RUN/flight_recorder."""
    return rf"rank-{rank}\.(recorder|stack|part)|(failed|phase)-{rank}\.(json|part)"


def clean(folder: Path) -> None:
    """Delete the files that ranks of an earlier attempt left in ``folder`` (RUN/flight_recorder), and no others.

    The first rank of every host calls it before the ranks connect, when none of this attempt's files exists.

    Raises:
        HvdlmError: one can't be deleted: it would be taken for this attempt's; or the folder is a link.
    """
    try:
        if safe_files.kind(folder) not in (None, "folder"):
            raise OSError(errno.ENOTDIR, f"it is a {safe_files.kind(folder)}, not a folder", str(folder))
        safe_files.delete_owned(folder, rf"{_names()}|(hang|told)\.json|diagnosis\.(txt|part)")
    except OSError as error:
        raise HvdlmError(f"{error.filename}: {error.strerror}: move it elsewhere, or delete it.") from error
