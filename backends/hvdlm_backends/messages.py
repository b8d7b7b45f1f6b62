"""Host-side messages (bytes) between all ranks: over mpi4py, or without MPI over a framework's Horovod."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from hvdlm.protocols.group import Handle
from hvdlm_backends.horovod_support import HorovodMessages


class Messages(Protocol):
    """Transport of a World's host-side messages. All ranks call the same methods in the same order."""

    def gather(self, data: bytes) -> list[bytes]:
        """Return the bytes of each rank, at least one from each, in rank order."""

    def broadcast(self, data: bytes | None, root: int) -> bytes:
        """Return rank ``root``'s bytes, below 2 GB."""

    def add(self, counts: Sequence[int]) -> Handle:
        """Start to sum the ``counts`` of all ranks, one sum at a time; ``wait`` returns ``list[int]``."""


class FunctionHandle:
    """A handle whose ``wait`` is a given function."""

    def __init__(self, wait: Callable[[], Any]) -> None:
        self.wait = wait


class MPIMessages:
    """Messages over mpi4py, on duplicated communicators, separate from Horovod's collectives."""

    def __init__(self, communicator: Any) -> None:
        self.communicator = communicator
        self._background = communicator.Dup()

    def gather(self, data: bytes) -> list[bytes]:
        """Return every rank's bytes; see ``Messages``."""
        return self.communicator.allgather(data)

    def broadcast(self, data: bytes | None, root: int) -> bytes:
        """Return the root's bytes; see ``Messages``."""
        is_root = self.communicator.Get_rank() == root
        buffer = np.frombuffer(data or b"", np.uint8) if is_root else np.empty(0, np.uint8)
        length = np.array([buffer.size], np.int64)
        self.communicator.Bcast(length, root)
        if not is_root:
            buffer = np.empty(int(length[0]), np.uint8)
        self.communicator.Bcast(buffer, root)
        return buffer.tobytes()

    def add(self, counts: Sequence[int]) -> Handle:
        """Start a sum in the background; see ``Messages``."""
        sent = np.array(counts, np.int64)
        received = np.empty_like(sent)
        request = self._background.Iallreduce(sent, received)

        def wait() -> list[int]:
            request.Wait()
            return [int(total) for total in received[: len(sent)]]  # both buffers live as long as this function

        return FunctionHandle(wait)


class ArrayMessages:
    """Messages over the arrays of a framework's Horovod."""

    def __init__(self, hvd: ModuleType, arrays: HorovodMessages) -> None:
        self._hvd = hvd
        self._arrays = arrays

    def gather(self, data: bytes) -> list[bytes]:
        """Return every rank's bytes; see ``Messages``."""
        sizes = self._arrays.all_gather(np.array([len(data)], np.int64), "hvdlm.object_sizes")
        gathered = self._arrays.all_gather(np.frombuffer(bytearray(data), np.uint8), "hvdlm.objects").tobytes()
        ends = np.cumsum(sizes)
        return [gathered[end - size : end] for end, size in zip(ends, sizes, strict=True)]

    def broadcast(self, data: bytes | None, root: int) -> bytes:
        """Return the root's bytes; every rank sends one byte besides, since Horovod gathers at least one from each."""
        sent = bytearray((data or b"") if self._hvd.rank() == root else b"") + b"\0"
        gathered = self._arrays.all_gather(np.frombuffer(sent, np.uint8), "hvdlm.bytes")
        return gathered[root : len(gathered) - (self._hvd.size() - root)].tobytes()

    def add(self, counts: Sequence[int]) -> Handle:
        """Start a sum in the background; see ``Messages``."""
        return FunctionHandle(self._arrays.start_sum(counts, "hvdlm.agree"))
