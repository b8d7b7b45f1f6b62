"""Sums of large arrays between hosts, around a ring of ranks, in segments that fill both directions of every link.

A rank sends to the next one and receives from the one before it. Each sends 2 (n - 1) / n of the array's bytes on n
ranks, the least that a sum needs (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms"): the array is cut
into n chunks, of which every rank sums one while it travels around the ring, and which then travel around once more.

The rings of MPI libraries wait for a chunk before they send the next one, and announce every large message, so that
links are idle while announcements are answered: Open MPI 4.1 used 63% of a link of 100 Mbit/s. Here chunks travel in
segments so small that MPI sends them at once, and of which many are under way; a segment that has arrived is added and
sent on while the next ones travel. hvdlm's build of Horovod does the same (hvdlm_horovod.ring_edits).

Chunk c, elements ``[c size / n, (c + 1) size / n)`` rounded down, is added in the order of the ring from rank c on:
((x_c + x_(c + 1)) + x_(c + 2)) + ...; the result is the same on all ranks, and does not depend on time or hosts.
"""

from __future__ import annotations

import math
import os
import time
from typing import Any

import numpy as np

from hvdlm.errors import HvdlmError
from hvdlm.io.untrusted_input import shown

BYTES = 131_072
"""The smallest array that is summed around the ring between hosts; below, latency counts more than bandwidth."""
VARIABLE = "HOROVOD_RING_THRESHOLD"
_SEGMENT = 32_768  # bytes; less than the 64 KB up to which Open MPI's TCP sends a message without announcing it
_WINDOW = 64  # segments under way: 2 MB, which 10 Gbit/s carry in 1.7 ms
_TAG = 7
_YIELDS = 20  # polls of a message before the thread sleeps between them
_POLL_SECONDS = 5e-5  # a tenth of the time in which 1 Gbit/s carries two segments
_HALF = ("float16", "bfloat16")


def threshold(option: int | None, several_hosts: bool) -> int:
    """Return the bytes from which on sums go around the ring; 0: none does.

    ``option``: communication.ring_bytes. None: the environment's HOROVOD_RING_THRESHOLD, else ``BYTES`` between hosts.

    Raises:
        HvdlmError: the environment's is no number.
    """
    if option is not None:
        return option
    text = os.environ.get(VARIABLE)
    if text is None:
        return BYTES if several_hosts else 0
    if not (text.isascii() and text.isdigit()):
        raise HvdlmError(
            f"{VARIABLE} is {shown(text)}, expected a number of bytes, 0 for no ring: correct or unset it."
        )
    return int(text)


class Schedule:
    """The elements that a rank sends and receives in every slot of a sum: a slot is one segment of one step.

    In step s of 2 (n - 1), rank r sends chunk r - s and receives chunk r - s - 1 (modulo n). In the first half it adds
    its own elements to what it receives.

    Attributes:
        segment: elements of a segment; the last one of a chunk may have fewer, or none.
        segments: of a chunk.
        reducing: the number of slots in which elements are added: the first ones.
        slots: the number of slots.
    """

    def __init__(self, elements: int, size: int, rank: int, segment: int) -> None:
        self._elements = elements
        self._size = size
        self._rank = rank
        self.segment = segment
        longest = math.ceil(elements / size)  # of the chunks
        self.segments = max(1, math.ceil(longest / segment))
        self.reducing = (size - 1) * self.segments
        self.slots = 2 * self.reducing

    def sent(self, slot: int) -> tuple[int, int]:
        """Return the range of elements that is sent in ``slot``."""
        step, index = divmod(slot, self.segments)
        return self._range((self._rank - step) % self._size, index)

    def received(self, slot: int) -> tuple[int, int]:
        """Return the range of elements that is received in ``slot``."""
        step, index = divmod(slot, self.segments)
        return self._range((self._rank - step - 1) % self._size, index)

    def _range(self, chunk: int, index: int) -> tuple[int, int]:
        end = self._elements * (chunk + 1) // self._size
        first = min(self._elements * chunk // self._size + index * self.segment, end)
        return first, min(first + self.segment, end)


def ring_sum(own: np.ndarray, total: np.ndarray, communicator: Any, segment_bytes: int = _SEGMENT) -> None:
    """Write the sum of the members' arrays ``own`` ``[n]`` into ``total`` ``[n]``, which may be the same memory.

    Both are contiguous and of one dtype; 16-bit floats are added in float32 and rounded once per addition. All members
    of the MPI communicator call this, from one thread each.
    """
    size, rank = communicator.Get_size(), communicator.Get_rank()
    if size == 1 or not own.size:
        if total is not own:
            total[...] = own
        return
    _Sum(own, total, communicator, Schedule(own.size, size, rank, max(1, segment_bytes // own.itemsize))).run()


class _Sum:
    """One sum: its messages under way. At most ``_WINDOW`` are, so that a slow rank's neighbours need no memory."""

    def __init__(self, own: np.ndarray, total: np.ndarray, communicator: Any, schedule: Schedule) -> None:
        size, rank = communicator.Get_size(), communicator.Get_rank()
        self._own, self._total = own, total
        self._own_bytes, self._total_bytes = (array.view(np.uint8).data for array in (own, total))
        self._width = own.itemsize
        self._communicator = communicator
        self._next, self._before = (rank + 1) % size, (rank - 1) % size
        self._schedule = schedule
        self._window = min(_WINDOW, schedule.segments)
        self._incoming = [np.empty(schedule.segment, own.dtype) for _ in range(self._window)]
        self._incoming_bytes = [array.view(np.uint8).data for array in self._incoming]
        self._receives: list[Any] = [None] * self._window
        self._sends: list[Any] = [None] * self._window

    def run(self) -> None:
        """Take part in the sum."""
        for slot in range(self._window):
            self._post(slot)
        for slot in range(self._schedule.slots):
            index = slot % self._window
            _wait(self._receives[index])
            if slot < self._schedule.reducing:
                first, stop = self._schedule.received(slot)
                _add(self._incoming[index][: stop - first], self._own[first:stop], self._total[first:stop])
            # What a slot sends lies where a later one receives, (n - 1) ``segments`` slots on: at least a window.
            _wait(self._sends[index])
            if slot + self._window < self._schedule.slots:
                self._post(slot + self._window)

    def _post(self, slot: int) -> None:
        """Start to receive and to send what belongs to a slot; what it sends has been received a step before."""
        index, width = slot % self._window, self._width
        first, stop = self._schedule.received(slot)
        if slot < self._schedule.reducing:
            target = self._incoming_bytes[index][: (stop - first) * width]
        else:
            target = self._total_bytes[first * width : stop * width]
        self._receives[index] = self._communicator.Irecv(target, self._before, _TAG)
        source = self._own_bytes if slot < self._schedule.segments else self._total_bytes
        first, stop = self._schedule.sent(slot)
        self._sends[index] = self._communicator.Isend(source[first * width : stop * width], self._next, _TAG)


def _wait(request: Any) -> None:
    """Return when a message has been received or sent; MPI makes progress on all of them in ``Test``.

    The thread sleeps in between: the kernel sends and receives meanwhile, and the core is the backward pass's.
    """
    for _ in range(_YIELDS):
        if request.Test():
            return
    while not request.Test():
        time.sleep(_POLL_SECONDS)


def _add(received: np.ndarray, own: np.ndarray, total: np.ndarray) -> None:
    """Write ``received + own`` into ``total``, which may be the memory of ``own``."""
    with np.errstate(all="ignore"):  # infinite values are the step guard's to notice
        if total.dtype.name in _HALF:
            total[...] = (received.astype(np.float32) + own.astype(np.float32)).astype(total.dtype)
        else:
            np.add(received, own, out=total)
