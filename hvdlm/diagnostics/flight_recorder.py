"""A rank's ledger of collectives: a ring of fixed-size records in memory, which a file mirrors.

The file is read when ranks no longer answer (``ledger_view``), so that whatever a rank wrote last must be in it: it is
memory-mapped, and outlives the process.
"""

from __future__ import annotations

import itertools
import mmap
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

MAGIC = b"hvdlmLG1"
RECORDS = 2048
HEADER = struct.Struct("<8sIIIIqqd64s")  # magic, bytes of a record, records, rank, size, pid, step, heartbeat, host
RECORD = struct.Struct("<QQqddQ208s")  # sequence, place in its group, step, begun, ended, flags, what it is
WHAT = struct.Struct("<16s64s24s24s12s68s")  # operation, name, ranks, shape, dtype, call site
_ENDED = struct.Struct("<d")
_ALIVE = struct.Struct("<qd")  # step and heartbeat, within the header
_ENDED_AT, _ALIVE_AT = 32, 32
FIRST = 256
IN_GRAPH = 1
_BYTES = FIRST + RECORDS * RECORD.size

# Who hands a collective on for its caller, so that the call site is the frame before it.
_BETWEEN = (
    *(
        "hvdlm_backends.",
        "hvdlm_compression.",
        "hvdlm.communication.all_reduce",
        "hvdlm.diagnostics.flight_recorder",
        "hvdlm_tensorflow.counted_graph",
    ),
    *("contextlib", "functools", "keras.", "tensorflow.", "torch."),
)


class Members:
    """A group's column of the ledger: its ranks as text, how many collectives it had, and which they were."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.text = ranks_text(ranks)
        self.places = itertools.count()
        self.calls: dict[tuple[str, str, bytes], Call] = {}


class Call(NamedTuple):
    """What is known of a collective before it begins; ``given``: shapes and dtypes."""

    members: Members
    given: list[tuple[Any, Any]]
    what: bytes


def ranks_text(ranks: Sequence[int]) -> str:
    """Return ``0-6/2`` for 0, 2, 4, 6: the groups of a mesh are even rows of ranks."""
    ranks = list(ranks)
    if len(ranks) == 1:
        return str(ranks[0])
    step = ranks[1] - ranks[0] if len(ranks) > 1 else 1
    if ranks and step > 0 and ranks == list(range(ranks[0], ranks[-1] + 1, step)):
        return f"{ranks[0]}-{ranks[-1]}" + ("" if step == 1 else f"/{step}")
    return ",".join(map(str, ranks))


def ranks_in(text: str) -> Sequence[int]:
    """Return the ranks that ``ranks_text`` wrote; none where the text is cut off or senseless."""
    try:
        span, _, step = text.partition("/")
        first, dash, last = span.partition("-")
        if dash:
            return range(int(first), int(last) + 1, int(step or 1))
        return tuple(int(rank) for rank in text.split(","))
    except ValueError:
        return ()


_sites: dict[tuple[int, int], tuple[CodeType, bytes | None]] = {}


def _site() -> bytes:
    """Return ``folder/file.py:line`` of the nearest frame that is no mere messenger."""
    frame = sys._getframe(2)
    while True:
        code = frame.f_code
        known = _sites.get((id(code), frame.f_lineno))
        if known is None:
            between = str(frame.f_globals.get("__name__", "")).startswith(_BETWEEN)
            named = "/".join(code.co_filename.split(os.sep)[-2:]) + f":{frame.f_lineno}"
            # The code is kept with its line, so that no other gets its id.
            known = _sites[id(code), frame.f_lineno] = (code, None if between else named.encode()[-68:])
        if known[1] is not None or frame.f_back is None:
            return known[1] or b""
        frame = frame.f_back


def _shape(tensors: Sequence[Any]) -> tuple[str, str]:
    """Return the shape and the dtype of what a collective is given, as the ledger shows them."""
    if not tensors:
        return "", ""
    dtype = str(getattr(tensors[0].dtype, "name", tensors[0].dtype)).rpartition(".")[2]
    text = "[" + ",".join("?" if n is None else str(n) for n in tuple(tensors[0].shape)) + "]"
    return (text if len(tensors) == 1 else f"{len(tensors)} from {text}"), dtype


class FlightRecorder:
    """What this rank's collectives were, the newest ``RECORDS`` of them; in memory until ``keep_in``.

    Attributes:
        folder: where the file is; None: in memory only.
        open: the collectives under way outside of graphs, by sequence number, with the time at which each began.
        last: ``time.monotonic()`` of the last sign of progress.
        current_step: the step that ``step`` told last.
        failing: this rank has an error to tell, so that its silence is no hang.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.folder: Path | None = None
        self.open: dict[int, float] = {}
        self.last = time.monotonic()
        self.failing = False
        self.current_step = 0
        self._sequence, self._latest = itertools.count(1), 0
        self._members: dict[tuple[int, ...], Members] = {}
        self._buffer: Any = bytearray(0)
        self._trace: list[tuple[Call, int]] | None = None

    def members(self, ranks: Sequence[int]) -> Members:
        """Return the column of the group of these ranks."""
        key = tuple(ranks)
        return self._members.setdefault(key, Members(key))

    def begin(self, operation: str, name: str, members: Members, tensors: Sequence[Any] = ()) -> int:
        """Write that a collective begins; return its number, for ``end``. While a graph is traced: 0."""
        call = self._call(operation, name, members, tensors, _site())
        if self._trace is None:
            number = self._write(call, 0)
            self.open[number] = self.last
            return number
        self._trace.append((call, self._write(call, IN_GRAPH)))
        return 0

    def end(self, number: int) -> None:
        """Write that collective ``number`` has ended; of 0, nothing."""
        if self.open.pop(number, None) is not None:
            self.last = time.monotonic()
            self._write_end(number)

    @contextmanager
    def graph(self, calls: Sequence[Call]) -> Iterator[list[Call]]:
        """Write ``calls`` as begun, and all as ended when the graph has run; yield what its trace calls.

        ``calls`` are those of an earlier run of the graph: without a trace, nothing of it runs in Python.
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

    def _call(self, operation: str, name: str, members: Members, tensors: Sequence[Any], site: bytes) -> Call:
        given = [(tensor.shape, tensor.dtype) for tensor in tensors]
        key = (operation, name, site)
        call = members.calls.get(key)
        if call is None or call.given != given:
            if len(members.calls) > 4 * RECORDS:
                members.calls.clear()
            texts = (operation, name, members.text, *_shape(tensors))
            call = Call(members, given, WHAT.pack(*(text.encode() for text in texts), site))
            members.calls[key] = call
        return call

    def _write(self, call: Call, flags: int) -> int:
        if not self._buffer:
            self._buffer = bytearray(_BYTES)
        number = self._latest = next(self._sequence)
        self.last = time.monotonic()
        values = (number, next(call.members.places), self.current_step, time.time(), 0.0, flags, call.what)
        RECORD.pack_into(self._buffer, _place(number), *values)
        return number

    def _write_end(self, number: int) -> None:
        if self._latest - number < RECORDS:
            _ENDED.pack_into(self._buffer, _place(number) + _ENDED_AT, time.time())

    def step(self, number: int) -> None:
        """Note that step ``number`` begins."""
        self.current_step = number
        self.beat()
        self.alive()

    def alive(self) -> None:
        """Note progress of something that is neither a step nor a collective."""
        self.last = time.monotonic()

    def beat(self) -> None:
        """Write step and time into the header: this rank's Python runs."""
        if self._buffer:
            _ALIVE.pack_into(self._buffer, _ALIVE_AT, self.current_step, time.time())

    def keep_in(self, folder: Path, rank: int) -> None:
        """Go on in ``folder/rank-0000.ledger``; where that can't be written, in memory."""
        self.rank = rank
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mapped = _mapped(folder / f"rank-{rank:04d}.recorder")
        except OSError:
            return
        mapped[: len(self._buffer)] = bytes(self._buffer)
        header = (MAGIC, RECORD.size, RECORDS, rank, self.size, os.getpid(), self.current_step, time.time())
        HEADER.pack_into(mapped, 0, *header, socket.gethostname().encode()[:64])
        self._buffer, self.folder = mapped, folder

    def flush(self) -> None:
        """Have the file written, so that ranks on other hosts see it."""
        if isinstance(self._buffer, mmap.mmap):
            self._buffer.flush()

    def discard(self) -> None:
        """After an orderly end: delete this rank's files, and the folder where they were the last."""
        if self.folder is None:
            return
        clean(self.folder, f"rank-{self.rank:04d}")
        try:
            self.folder.rmdir()
        except OSError:
            pass  # other ranks aren't done yet


def _place(number: int) -> int:
    """Return where in a file the record of collective ``number`` lies."""
    return FIRST + (number - 1) % RECORDS * RECORD.size


def _mapped(path: Path) -> mmap.mmap:
    """Return a new file of a ledger's size, mapped; its space is taken now, since a full disk would end the rank."""
    path.unlink(missing_ok=True)
    with path.open("xb+") as file:
        allocate = getattr(os, "posix_fallocate", lambda descriptor, _, size: os.ftruncate(descriptor, size))
        allocate(file.fileno(), 0, _BYTES)
        return mmap.mmap(file.fileno(), _BYTES)


def clean(folder: Path, name: str = "*") -> None:
    """Delete what ranks of an earlier attempt left in ``folder``, RUN/flight_recorder; where that can't be, leave it.

    The first rank of every host calls it before it meets the others: what this attempt will write isn't there yet.
    """
    for kind in ("recorder", "stack", "json", "txt", "part"):
        for path in folder.glob(f"{name}.{kind}"):
            try:
                path.unlink(missing_ok=True)
            except OSError:
                continue
