"""Host-side messages (bytes) between all ranks: over mpi4py, or over Horovod's collectives without MPI."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from hvdlm.protocols.group import Handle


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


class _HorovodMessages:
    """Messages over Horovod's all-gather of bytes, which exists for every framework."""

    communicator = None

    def __init__(self, hvd: ModuleType) -> None:
        self._hvd = hvd

    def _all_gather(self, array: np.ndarray, name: str) -> np.ndarray:
        raise NotImplementedError

    def gather(self, data: bytes) -> list[bytes]:
        """Return every rank's bytes; see ``Messages``."""
        sizes = self._all_gather(np.array([len(data)], np.int64), "hvdlm.object_sizes")
        gathered = self._all_gather(np.frombuffer(bytearray(data), np.uint8), "hvdlm.objects").tobytes()
        ends = np.cumsum(sizes)
        return [gathered[end - size : end] for end, size in zip(ends, sizes, strict=True)]

    def broadcast(self, data: bytes | None, root: int) -> bytes:
        """Return the root's bytes; every rank sends one byte besides, since Horovod gathers at least one from each."""
        sent = bytearray((data or b"") if self._hvd.rank() == root else b"") + b"\0"
        gathered = self._all_gather(np.frombuffer(sent, np.uint8), "hvdlm.bytes")
        return gathered[root : len(gathered) - (self._hvd.size() - root)].tobytes()


class TorchMessages(_HorovodMessages):
    """Messages over ``horovod.torch``."""

    def __init__(self, hvd: ModuleType) -> None:
        super().__init__(hvd)
        self._torch = sys.modules["torch"]

    def _all_gather(self, array: np.ndarray, name: str) -> np.ndarray:
        return self._hvd.allgather(self._torch.from_numpy(array), name=name).numpy()

    def add(self, counts: Sequence[int]) -> Handle:
        """Start a sum in the background; see ``Messages``."""
        tensor = self._torch.tensor(list(counts), dtype=self._torch.int32)
        handle = self._hvd.allreduce_async_(tensor, op=self._hvd.Sum, name="hvdlm.agree")
        return FunctionHandle(lambda: self._hvd.synchronize(handle).tolist())


class TensorFlowMessages(_HorovodMessages):
    """Messages over ``horovod.tensorflow``."""

    def __init__(self, hvd: ModuleType) -> None:
        super().__init__(hvd)
        self._tensorflow = sys.modules["tensorflow"]
        # Outside of graphs, TensorFlow reuses an operation that it has made before even if that had another name.
        self._add = self._tensorflow.function(self._sum, autograph=False)
        self._thread = ThreadPoolExecutor(1, "hvdlm-agree")

    def _all_gather(self, array: np.ndarray, name: str) -> np.ndarray:
        return self._hvd.allgather(self._tensorflow.constant(array), name=name).numpy()

    def _sum(self, tensor: Any) -> Any:
        return self._hvd.allreduce(tensor, op=self._hvd.Sum, name="hvdlm.agree", ignore_name_scope=True)

    def add(self, counts: Sequence[int]) -> Handle:
        """Start a sum in the background; see ``Messages``."""
        tensor = self._tensorflow.constant(list(counts), "int32")
        # TensorFlow returns from a graph only when its operations have finished: a thread waits for it.
        return FunctionHandle(self._thread.submit(lambda: self._add(tensor).numpy().tolist()).result)


def make_messages(hvd: ModuleType, communicator: Any) -> Messages:
    """Return messages over mpi4py where there is a ``communicator``, else over the framework's Horovod."""
    if communicator is not None:
        return MPIMessages(communicator)
    return TorchMessages(hvd) if hvd.__name__.endswith("torch") else TensorFlowMessages(hvd)
