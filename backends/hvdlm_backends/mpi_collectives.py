"""Blocking collectives on numpy arrays of any dtype over an mpi4py communicator; results are new arrays.

Sums of float16 and bfloat16, which MPI doesn't support, use a custom MPI operation that adds in float32.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from hvdlm_backends.ring_sum import ring_sum

_ALIGNMENT = 64  # bytes; TensorFlow and DLPack require it to use memory without a copy
_MAX_ELEMENTS = 2**30  # of one call: MPI counts in 32 bits
_MIN_REUSED, _MAX_REUSED = 2**20, 2**29  # bytes of a result whose memory is kept for later results
_KEPT = 16  # newest results whose memory is kept
_UNUSED = 3  # references to an array that is in use nowhere: those of the list, the loop and getrefcount
_HALF = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class Memory:
    """Memory of results, reused when nothing refers to it any more: new pages would cost a tenth of a sum's time."""

    def __init__(self) -> None:
        self._kept: list[np.ndarray] = []
        self._lock = threading.Lock()

    def take(self, size: int) -> np.ndarray:
        """Return ``size`` bytes that nothing else refers to, aligned for every framework."""
        if not _MIN_REUSED <= size <= _MAX_REUSED:
            return _aligned(size)
        with self._lock:
            for index in range(len(self._kept)):
                memory = self._kept[index]
                if memory.size == size and sys.getrefcount(memory) == _UNUSED:
                    del self._kept[index]
                    break
            else:
                memory = _aligned(size)
            self._kept = [*self._kept[1 - _KEPT :], memory]  # the newest last
        return memory[:]


def _aligned(size: int) -> np.ndarray:
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % _ALIGNMENT
    # frombuffer makes an array that later views have as their base, instead of ``memory``: its references are counted.
    return np.frombuffer(memory.data[first : first + size], np.uint8)


_memory = Memory()


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an uninitialised array, aligned for every framework."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return _memory.take(size).view(dtype).reshape(shape)


def all_reduce(array: np.ndarray, in_place: bool, communicator: Any, ring: bool = False) -> np.ndarray:
    """Return the sum over members, of the same shape.

    ``in_place``: in the memory of ``array``. ``ring``: around a ring of the members, instead of as MPI chooses.
    """
    mpi = _mpi()
    total = array if in_place else empty(array.shape, array.dtype)
    if ring:
        ring_sum(array.reshape(-1), total.reshape(-1), communicator)
        return total
    sent, received, operation = _summable(array), _summable(total), sum_of(array.dtype)
    for start in range(0, sent.size, _MAX_ELEMENTS):
        chunk = received[start : start + _MAX_ELEMENTS]
        communicator.Allreduce(mpi.IN_PLACE if in_place else sent[start : start + _MAX_ELEMENTS], chunk, operation)
    return total


def adasum(array: np.ndarray, in_place: bool, communicator: Any) -> np.ndarray:
    """Return the members' vectors combined pairwise (Maleki et al. 2020, eq. 3), equal on all members.

    adasum(a, b) = (1 - a.b / 2 a.a) a + (1 - a.b / 2 b.b) b; the number of members is a power of two.
    """
    combined = array.astype(np.float64 if array.dtype == np.float64 else np.float32).reshape(-1)
    rank, distance = communicator.Get_rank(), 1
    while distance < communicator.Get_size():
        partner = rank ^ distance
        other = np.empty_like(combined)
        communicator.Sendrecv(combined, partner, recvbuf=other, source=partner)
        first, second = (combined, other) if rank < partner else (other, combined)
        combined = combine(first, second)
        distance *= 2
    total = array if in_place else empty(array.shape, array.dtype)
    total[...] = combined.reshape(array.shape)
    return total


def combine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return adasum(a, b) of two vectors; see ``adasum``."""
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    product, square_a, square_b = wide_a @ wide_b, wide_a @ wide_a, wide_b @ wide_b
    factor_a = 1.0 - product / (2.0 * square_a) if square_a else 1.0
    factor_b = 1.0 - product / (2.0 * square_b) if square_b else 1.0
    return (factor_a * wide_a + factor_b * wide_b).astype(a.dtype)


def all_gather(array: np.ndarray, communicator: Any) -> np.ndarray:
    """Return ``[sum of n_i, ...]`` from members' ``[n_i, ...]``, in rank order."""
    lengths = np.empty(communicator.Get_size(), np.int64)
    communicator.Allgather(np.array([array.shape[0]], np.int64), lengths)
    gathered = empty((int(lengths.sum()), *array.shape[1:]), array.dtype)
    sent, received = as_integers(array), as_integers(gathered)
    if (lengths == lengths[0]).all():
        communicator.Allgather(sent, received)
    else:
        elements = lengths * _row_size(array)
        communicator.Allgatherv(sent, [received, elements.tolist()])
    return gathered


def reduce_scatter(array: np.ndarray, communicator: Any) -> np.ndarray:
    """Return this member's shard ``[n / size, ...]`` of the sum ``[n, ...]``; the first members take the remainder."""
    size, rank = communicator.Get_size(), communicator.Get_rank()
    rows = shard_rows(array.shape[0], size)
    shard = empty((rows[rank], *array.shape[1:]), array.dtype)
    sent, received, operation = _summable(array), _summable(shard), sum_of(array.dtype)
    if array.shape[0] % size == 0:
        communicator.Reduce_scatter_block(sent, received, operation)
    else:
        communicator.Reduce_scatter(sent, received, [n * _row_size(array) for n in rows], operation)
    return shard


def shard_rows(rows: int, size: int) -> list[int]:
    """Return how many of ``rows`` each of ``size`` members gets of a reduce-scatter."""
    return [rows // size + (member < rows % size) for member in range(size)]


def broadcast(array: np.ndarray, root: int, communicator: Any) -> np.ndarray:
    """Return the array of member ``root``; the other members' arrays give only the shape."""
    received = empty(array.shape, array.dtype)
    if communicator.Get_rank() == root:
        received[...] = array
    communicator.Bcast(as_integers(received), root)
    return received


def all_to_all(array: np.ndarray, communicator: Any) -> np.ndarray:
    """Return ``[n, ...]``: shard j of every member's equally split ``[n, ...]`` is sent to member j."""
    received = empty(array.shape, array.dtype)
    communicator.Alltoall(as_integers(array), as_integers(received))
    return received


def barrier(communicator: Any) -> None:
    """Return when all members have called it."""
    communicator.Barrier()


def on_several_hosts(communicator: Any) -> bool:
    """Return whether some members can't share memory. All members call this."""
    sharing = communicator.Split_type(_mpi().COMM_TYPE_SHARED)
    try:
        return bool(sharing.Get_size() < communicator.Get_size())
    finally:
        sharing.Free()


def sum_of(dtype: np.dtype) -> Any:
    """Return the MPI operation that sums this dtype."""
    return _half_sum(dtype.name) if dtype.name in _HALF else _mpi().SUM


@functools.cache
def _half_sum(name: str) -> Any:
    """Return the operation that adds two 16-bit floats in float32 and rounds once."""
    return _mpi().Op.Create(_adder(_HALF[name]), commute=True)


def _adder(dtype: np.dtype) -> Callable[[Any, Any, Any], None]:
    def add(addend: Any, total: Any, _: Any) -> None:
        values, sums = np.frombuffer(addend, dtype), np.frombuffer(total, dtype)
        sums[...] = (values.astype(np.float32) + sums.astype(np.float32)).astype(dtype)

    return add


def _summable(array: np.ndarray) -> np.ndarray:
    """Return the flat view that MPI adds: 16-bit floats as integers of the same width."""
    flat = array.reshape(-1)
    return flat.view(np.uint16) if flat.dtype.name in _HALF else flat


def as_integers(array: np.ndarray) -> np.ndarray:
    """Return a flat view as integers of the same width, for collectives that only copy."""
    return array.reshape(-1).view(f"u{array.dtype.itemsize}") if array.dtype.itemsize in (1, 2, 4, 8) else array


def _row_size(array: np.ndarray) -> int:
    """Return the number of elements of one row (entry of the first axis)."""
    return int(np.prod(array.shape[1:], dtype=np.int64))


def _mpi() -> Any:
    return sys.modules["mpi4py.MPI"]
