"""Horovod on PyTorch's tensors (``horovod.torch``): collectives, messages of a launch without MPI, and GPUs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from hvdlm.protocols.group import Handle

_POLL_SECONDS = 5e-5  # shortest interval between two polls
_POLL_FRACTION = 0.03  # of the time waited so far: the longer the wait, the rarer the polls


class _Handle:
    """A collective in flight."""

    def __init__(self, hvd: ModuleType, handle: int, sleeps: bool) -> None:
        self._hvd = hvd
        self._handle = handle
        self._sleeps = sleeps

    def wait(self) -> torch.Tensor:
        """Return the result."""
        started = time.perf_counter()
        # Where Horovod is not hvdlm's build (hvdlm_horovod.patches), synchronize spins and takes the core from the
        # thread that communicates; polling too often does so, too.
        while not (self._sleeps or self._hvd.poll(self._handle)):
            time.sleep(max(_POLL_SECONDS, _POLL_FRACTION * (time.perf_counter() - started)))
        result = self._hvd.synchronize(self._handle)
        return result[0] if isinstance(result, tuple) else result  # an all-to-all returns (tensor, splits)


class _FromHost:
    """A collective in flight on a copy in host memory of ``tensor``, which is on a GPU."""

    def __init__(self, handle: Handle, tensor: torch.Tensor, in_place: bool) -> None:
        self._handle = handle
        self._tensor = tensor
        self._in_place = in_place

    def wait(self) -> torch.Tensor:
        """Return the result, on the GPU."""
        result = self._handle.wait()
        if not self._in_place:
            return result.to(self._tensor.device)
        with torch.no_grad():
            return self._tensor.copy_(result)


class Operations:
    """Implements ``HorovodOperations``; ``on_host``: tensors on GPUs are copied to host memory and back."""

    def __init__(self, hvd: ModuleType, on_host: bool) -> None:
        self._hvd = hvd
        self._on_host = on_host
        self._sleeps = hasattr(hvd.mpi_ops.mpi_lib, "horovod_torch_wait_sleeps")
        self._reductions = {"sum": hvd.Sum, "adasum": hvd.Adasum}
        self._start = {
            "all_reduce": hvd.allreduce_async_,  # sums are computed in place
            "all_gather": hvd.allgather_async,
            "reduce_scatter": hvd.reducescatter_async,
            "all_to_all": hvd.alltoall_async,
        }

    def start(self, operation: str, tensor: torch.Tensor, name: str, members: Any, op: str = "sum") -> Handle:
        """Start a collective."""
        if self._on_host and tensor.device.type != "cpu":
            handle = self.start(operation, tensor.detach().cpu(), name, members, op)
            return _FromHost(handle, tensor, operation == "all_reduce")
        options = {"op": self._reductions[op]} if operation in ("all_reduce", "reduce_scatter") else {}
        handle = self._start[operation](tensor, name=name, process_set=members, **options)
        return _Handle(self._hvd, handle, self._sleeps)

    def start_broadcast(self, tensor: torch.Tensor, root: int, name: str, members: Any) -> Handle:
        """Start a broadcast."""
        if self._on_host and tensor.device.type != "cpu":
            return _FromHost(self.start_broadcast(tensor.detach().cpu(), root, name, members), tensor, False)
        handle = self._hvd.broadcast_async(tensor, root_rank=root, name=name, process_set=members)
        return _Handle(self._hvd, handle, self._sleeps)

    def broadcast(self, tensor: torch.Tensor, root: int, name: str, members: Any) -> torch.Tensor:
        """Return the root's tensor."""
        return self.start_broadcast(tensor, root, name, members).wait()

    def sum_together(self, tensors: Sequence[torch.Tensor], name: str, members: Any) -> list[torch.Tensor]:
        """Return the sums, of one flat tensor: far cheaper than Horovod's fusion with its handle for each tensor."""
        flat = self.start("all_reduce", _flatten_dense_tensors(tensors), name, members).wait()
        return list(_unflatten_dense_tensors(flat, tensors))

    def barrier(self, members: Any) -> None:
        """Wait for all members."""
        self._hvd.barrier(process_set=members)

    def close(self) -> None:
        """Do nothing: Horovod's own thread serves all collectives."""


class Messages:
    """Implements ``HorovodMessages``."""

    def __init__(self, hvd: ModuleType) -> None:
        self._hvd = hvd

    def all_gather(self, array: np.ndarray, name: str) -> np.ndarray:
        """Return the concatenation of the ranks' arrays."""
        return self._hvd.allgather(torch.from_numpy(array), name=name).numpy()

    def start_sum(self, counts: Sequence[int], name: str) -> Callable[[], list[int]]:
        """Start a sum in the background."""
        tensor = torch.tensor(list(counts), dtype=torch.int32)
        handle = self._hvd.allreduce_async_(tensor, op=self._hvd.Sum, name=name)
        return lambda: self._hvd.synchronize(handle).tolist()


class GPUs:
    """Implements ``GPUs``."""

    def count(self) -> int:
        """Return the number of GPUs."""
        return torch.cuda.device_count()

    def in_use(self) -> bool:
        """Return whether there is a GPU: tensors are on it, and Horovod is given them as they are."""
        return torch.cuda.is_available()

    def bind(self, local_rank: int) -> None:
        """Make the local rank's GPU the current one."""
        torch.cuda.set_device(local_rank % self.count())

    def copy_to(self, array: np.ndarray, local_rank: int) -> torch.Tensor:
        """Return ``array`` on the local rank's GPU."""
        return torch.from_numpy(array).cuda(local_rank % self.count())


class Horovod:
    """Implements ``HorovodSupport``."""

    def __init__(self) -> None:
        self.gpus = GPUs()

    def operations(self, hvd: ModuleType, on_host: bool) -> Operations:
        """Return the collectives of ``hvd``."""
        return Operations(hvd, on_host)

    def messages(self, hvd: ModuleType) -> Messages:
        """Return the messages over ``hvd``."""
        return Messages(hvd)
