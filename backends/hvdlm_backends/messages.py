"""Small values between all ranks: over mpi4py, or over Horovod's own collectives where ranks met without MPI."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from hvdlm.protocols.group import Handle


class Messages(Protocol):
    """What a World's small values travel by. All ranks call everything, in the same order."""

    def gather(self, data: bytes) -> list[bytes]:
        """Return every rank's bytes, one or more of each, in rank order."""

    def broadcast(self, data: bytes | None, root: int) -> bytes:
        """Return rank ``root``'s bytes, below 2 GB."""

    def add(self, counts: Sequence[int]) -> Handle:
        """Start to add up every rank's ``counts``; one sum is under way at a time. ``wait`` returns ``list[int]``."""


class Later:
    """A handle whose waiting is a function."""

    def __init__(self, wait: Callable[[], Any]) -> None:
        self.wait = wait


class MPIMessages:
    """Over mpi4py, on communicators of their own, so that Horovod's collectives don't mix with them."""

    def __init__(self, communicator: Any) -> None:
        self.communicator, self._background = communicator, communicator.Dup()

    def gather(self, data: bytes) -> list[bytes]:
        """Return every rank's bytes; see ``Messages``."""
        return self.communicator.allgather(data)

    def broadcast(self, data: bytes | None, root: int) -> bytes:
        """Return the root's bytes; see ``Messages``."""
        own = np.frombuffer(data or b"", np.uint8) if self.communicator.Get_rank() == root else None
        length = np.array([0 if own is None else own.size], np.int64)
        self.communicator.Bcast(length, root)
        buffer = np.empty(int(length[0]), np.uint8) if own is None else own
        self.communicator.Bcast(buffer, root)
        return buffer.tobytes()

    def add(self, counts: Sequence[int]) -> Handle:
        """Start a sum that goes on in the background; see ``Messages``."""
        sent = np.array(counts, np.int64)
        received = np.empty_like(sent)
        request = self._background.Iallreduce(sent, received)

        def wait() -> list[int]:
            request.Wait()
            return [int(total) for total in received[: len(sent)]]  # both buffers live as long as this function

        return Later(wait)


class _HorovodMessages:
    """Over Horovod's all-gather of bytes, which every framework brings."""

    communicator = None

    def __init__(self, hvd: ModuleType) -> None:
        self._hvd = hvd

    def _all_gather(self, array: np.ndarray, name: str) -> np.ndarray:
        raise NotImplementedError

    def gather(self, data: bytes) -> list[bytes]:
        """Return every rank's bytes; see ``Messages``."""
        sizes = self._all_gather(np.array([len(data)], np.int64), "hvdlm.object_sizes")
        whole = self._all_gather(np.frombuffer(bytearray(data), np.uint8), "hvdlm.objects").tobytes()
        ends = np.cumsum(sizes)
        return [whole[end - size : end] for end, size in zip(ends, sizes, strict=True)]

    def broadcast(self, data: bytes | None, root: int) -> bytes:
        """Return the root's bytes: each rank sends one more than it has to say, and only the root has something."""
        own = bytearray((data or b"") if self._hvd.rank() == root else b"") + b"\0"
        whole = self._all_gather(np.frombuffer(own, np.uint8), "hvdlm.bytes")
        return whole[root : len(whole) - (self._hvd.size() - root)].tobytes()


class TorchMessages(_HorovodMessages):
    """Over ``horovod.torch``."""

    def __init__(self, hvd: ModuleType) -> None:
        super().__init__(hvd)
        self._torch = sys.modules["torch"]

    def _all_gather(self, array: np.ndarray, name: str) -> np.ndarray:
        return self._hvd.allgather(self._torch.from_numpy(array), name=name).numpy()

    def add(self, counts: Sequence[int]) -> Handle:
        """Start a sum that goes on in the background; see ``Messages``."""
        tensor = self._torch.tensor(list(counts), dtype=self._torch.int32)
        handle = self._hvd.allreduce_async_(tensor, op=self._hvd.Sum, name="hvdlm.agree")
        return Later(lambda: self._hvd.synchronize(handle).tolist())


class TensorFlowMessages(_HorovodMessages):
    """Over ``horovod.tensorflow``."""

    def __init__(self, hvd: ModuleType) -> None:
        super().__init__(hvd)
        self._tensorflow = sys.modules["tensorflow"]
        # Outside of graphs, TensorFlow takes an operation that it has made before even if that had another name.
        self._add = self._tensorflow.function(self._sum, autograph=False)
        self._thread = ThreadPoolExecutor(1, "hvdlm-agree")

    def _all_gather(self, array: np.ndarray, name: str) -> np.ndarray:
        return self._hvd.allgather(self._tensorflow.constant(array), name=name).numpy()

    def _sum(self, tensor: Any) -> Any:
        return self._hvd.allreduce(tensor, op=self._hvd.Sum, name="hvdlm.agree", ignore_name_scope=True)

    def add(self, counts: Sequence[int]) -> Handle:
        """Start a sum that goes on in the background; see ``Messages``."""
        tensor = self._tensorflow.constant(list(counts), "int32")
        # Outside of a graph's run, TensorFlow's operations block: a thread waits instead.
        return Later(self._thread.submit(lambda: self._add(tensor).numpy().tolist()).result)


def make_messages(hvd: ModuleType, communicator: Any) -> Messages:
    """Return what fits: mpi4py where there is a ``communicator``, else the framework's Horovod."""
    if communicator is not None:
        return MPIMessages(communicator)
    return TorchMessages(hvd) if hvd.__name__.endswith("torch") else TensorFlowMessages(hvd)
