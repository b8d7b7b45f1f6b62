"""Collectives on numpy arrays over an mpi4py communicator: blocking, any dtype, results in memory of their own.

Sums of float16 and bfloat16, which MPI doesn't know, are an MPI operation of ours that adds in float32.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

_ALIGNMENT = 64  # bytes: what TensorFlow and DLPack ask of memory that they take over without a copy
_MOST = 2**30  # elements of one call: MPI counts in 32 bits
_REUSED = 2**20  # bytes from which memory is kept for later results
_LARGEST = 2**29  # bytes up to which it is: what is kept takes no more than 16 of these
_KEPT = 16  # of the newest results
_UNUSED = 3  # references to memory that nobody uses: the list's, the loop's and getrefcount's
_HALF = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class Memory:
    """Results' memory, used again when nobody refers to it any more: new pages cost a tenth of a sum's time."""

    def __init__(self) -> None:
        self._kept: list[np.ndarray] = []
        self._lock = threading.Lock()

    def take(self, size: int) -> np.ndarray:
        """Return ``size`` bytes that nobody else refers to, aligned for every framework."""
        if not _REUSED <= size <= _LARGEST:
            return _aligned(size)
        with self._lock:
            for place in range(len(self._kept)):
                memory = self._kept[place]
                if memory.size == size and sys.getrefcount(memory) == _UNUSED:
                    del self._kept[place]
                    break
            else:
                memory = _aligned(size)
            self._kept = [*self._kept[1 - _KEPT :], memory]  # the newest last
        return memory[:]


def _aligned(size: int) -> np.ndarray:
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % _ALIGNMENT
    # An array of its own, which those made of it refer to, instead of to all of the memory.
    return np.frombuffer(memory.data[first : first + size], np.uint8)


_memory = Memory()


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an uninitialised array whose memory is aligned for every framework."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return _memory.take(size).view(dtype).reshape(shape)


def all_reduce(array: np.ndarray, in_place: bool, communicator: Any) -> np.ndarray:
    """Return the sum over members, shape ``[...]`` kept; ``in_place``: in the memory of ``array``."""
    mpi = _mpi()
    total = array if in_place else empty(array.shape, array.dtype)
    sent, received, operation = _summable(array), _summable(total), sum_of(array.dtype)
    for start in range(0, sent.size, _MOST):
        part = received[start : start + _MOST]
        communicator.Allreduce(mpi.IN_PLACE if in_place else sent[start : start + _MOST], part, operation)
    return total


def adasum(array: np.ndarray, in_place: bool, communicator: Any) -> np.ndarray:
    """Return the members' vectors combined pair by pair (Maleki et al. 2020, eq. 3), the same on all members.

    adasum(a, b) = (1 - a.b / 2 a.a) a + (1 - a.b / 2 b.b) b; the members are a power of two.
    """
    own = array.astype(np.float64 if array.dtype == np.float64 else np.float32).reshape(-1)
    rank, distance = communicator.Get_rank(), 1
    while distance < communicator.Get_size():
        partner = rank ^ distance
        other = np.empty_like(own)
        communicator.Sendrecv(own, partner, recvbuf=other, source=partner)
        first, second = (own, other) if rank < partner else (other, own)
        own = _combined(first, second)
        distance *= 2
    total = array if in_place else empty(array.shape, array.dtype)
    total[...] = own.reshape(array.shape)
    return total


def _combined(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    product, of_a, of_b = wide_a @ wide_b, wide_a @ wide_a, wide_b @ wide_b
    factor_a = 1.0 - product / (2.0 * of_a) if of_a else 1.0
    factor_b = 1.0 - product / (2.0 * of_b) if of_b else 1.0
    return (factor_a * wide_a + factor_b * wide_b).astype(a.dtype)


def all_gather(array: np.ndarray, communicator: Any) -> np.ndarray:
    """Return ``[sum of n_i, ...]`` from members' ``[n_i, ...]``, in rank order."""
    lengths = np.empty(communicator.Get_size(), np.int64)
    communicator.Allgather(np.array([array.shape[0]], np.int64), lengths)
    whole = empty((int(lengths.sum()), *array.shape[1:]), array.dtype)
    sent, received = as_integers(array), as_integers(whole)
    if (lengths == lengths[0]).all():
        communicator.Allgather(sent, received)
    else:
        elements = lengths * _row(array)
        communicator.Allgatherv(sent, [received, elements.tolist()])
    return whole


def reduce_scatter(array: np.ndarray, communicator: Any) -> np.ndarray:
    """Return this member's ``[n / size, ...]`` of members' sum ``[n, ...]``; the first take what is left over."""
    size, rank = communicator.Get_size(), communicator.Get_rank()
    rows = [array.shape[0] // size + (member < array.shape[0] % size) for member in range(size)]
    part = empty((rows[rank], *array.shape[1:]), array.dtype)
    sent, received, operation = _summable(array), _summable(part), sum_of(array.dtype)
    if array.shape[0] % size == 0:
        communicator.Reduce_scatter_block(sent, received, operation)
    else:
        communicator.Reduce_scatter(sent, received, [n * _row(array) for n in rows], operation)
    return part


def broadcast(array: np.ndarray, root: int, communicator: Any) -> np.ndarray:
    """Return the array of member number ``root``; of the others only the shape counts."""
    received = empty(array.shape, array.dtype)
    if communicator.Get_rank() == root:
        received[...] = array
    communicator.Bcast(as_integers(received), root)
    return received


def all_to_all(array: np.ndarray, communicator: Any) -> np.ndarray:
    """Return ``[n, ...]``: part j of every member's equally split ``[n, ...]`` goes to member j."""
    received = empty(array.shape, array.dtype)
    communicator.Alltoall(as_integers(array), as_integers(received))
    return received


def barrier(communicator: Any) -> None:
    """Return when all members have called it."""
    communicator.Barrier()


def sum_of(dtype: np.dtype) -> Any:
    """Return MPI's sum of this dtype."""
    return _half_sum(dtype.name) if dtype.name in _HALF else _mpi().SUM


@functools.cache
def _half_sum(name: str) -> Any:
    """Return the operation that adds 16-bit floats in float32, and rounds each sum of two once."""
    return _mpi().Op.Create(_adder(_HALF[name]), commute=True)


def _adder(dtype: np.dtype) -> Callable[[Any, Any, Any], None]:
    def add(given: Any, total: Any, _: Any) -> None:
        own, sums = np.frombuffer(given, dtype), np.frombuffer(total, dtype)
        sums[...] = (own.astype(np.float32) + sums.astype(np.float32)).astype(dtype)

    return add


def _summable(array: np.ndarray) -> np.ndarray:
    """Return the flat view whose elements MPI adds; of 16-bit floats, what they are kept in."""
    flat = array.reshape(-1)
    return flat.view(np.uint16) if flat.dtype.name in _HALF else flat


def as_integers(array: np.ndarray) -> np.ndarray:
    """Return the flat view as integers of the same width, which MPI moves whatever they mean."""
    return array.reshape(-1).view(f"u{array.dtype.itemsize}") if array.dtype.itemsize in (1, 2, 4, 8) else array


def _row(array: np.ndarray) -> int:
    """Return the elements of one entry of the first axis."""
    return int(np.prod(array.shape[1:], dtype=np.int64))


def _mpi() -> Any:
    return sys.modules["mpi4py.MPI"]
