"""Tensors through host memory, for transports that know arrays alone (backend mpi4py).

A CPU's tensor shares its memory with the array, and sums take place in it. A GPU's is copied into pinned memory while
the caller continues: the thread that sums waits until the copy is there, and the result is copied back into the tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np
import torch
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from hvdlm.protocols.framework import HostCollective
from hvdlm.protocols.group import Handle


class TorchHostTensors:
    """Takes torch's tensors through host memory."""

    def __init__(self) -> None:
        self._pinned: dict[tuple[int, torch.dtype], list[_Pinned]] = {}

    def through(self, tensor: torch.Tensor, collective: HostCollective, shape: tuple[int | None, ...]) -> Handle:
        """Start ``collective`` on the values of ``tensor``; see ``interfaces.HostTensors``."""
        if tensor.is_cuda:
            return self._through_pinned(tensor.detach(), collective)
        dense = tensor.detach().contiguous()
        array = _array(dense)
        return _OnCPU(collective(array, None), array, dense, tensor)

    def _through_pinned(self, tensor: torch.Tensor, collective: HostCollective) -> Handle:
        pool = self._pinned.setdefault((tensor.numel(), tensor.dtype), [])
        pinned = next((p for p in pool if p.free()), None)
        if pinned is None:
            pinned = _Pinned(tensor)
            pool.append(pinned)
        return _OnGPU(collective(pinned.take(tensor), pinned.arrived), pinned, tensor)

    def together(self, tensors: Sequence[torch.Tensor], collective: HostCollective) -> Handle:
        """Start ``collective`` on the values of all ``tensors``; see ``interfaces.HostTensors``."""
        flat = _flatten_dense_tensors(tensors)
        return _Together(self.through(flat, collective, tuple(flat.shape)), tensors)


class _OnCPU:
    """A collective on memory that ``array`` and ``dense`` share; ``dense`` is ``given``, or a contiguous copy of it."""

    def __init__(self, handle: Handle, array: np.ndarray, dense: torch.Tensor, given: torch.Tensor) -> None:
        self._handle, self._array, self._dense, self._given = handle, array, dense, given

    def wait(self) -> torch.Tensor:
        """Return the result."""
        result = self._handle.wait()
        if result is not self._array:
            return _tensor(result)
        if self._dense.data_ptr() != self._given.data_ptr():
            with torch.no_grad():
                self._given.copy_(self._dense)
        return self._given


class _Together:
    """A collective on several tensors as one."""

    def __init__(self, handle: Handle, tensors: Sequence[torch.Tensor]) -> None:
        self._handle, self._tensors = handle, tensors

    def wait(self) -> list[torch.Tensor]:
        """Return the results."""
        return list(_unflatten_dense_tensors(self._handle.wait(), self._tensors))


class _Pinned:
    """Page-locked host memory of a tensor's size, from which and into which a GPU copies by itself."""

    def __init__(self, like: torch.Tensor) -> None:
        self.memory = torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
        self._copied = torch.cuda.Event(blocking=True)  # whoever waits sleeps
        self._taken = False

    def free(self) -> bool:
        """Return whether nothing is copied into or out of it any more."""
        return not self._taken and self._copied.query()

    def take(self, tensor: torch.Tensor) -> np.ndarray:
        """Begin to copy ``tensor`` here; return the array, to be read when ``arrived`` has returned."""
        self._taken = True
        self.memory = self.memory.view(tensor.shape)
        self.memory.copy_(tensor, non_blocking=True)
        self._copied.record()
        return _array(self.memory)

    def arrived(self) -> None:
        """Return when what ``take`` copies is here."""
        self._copied.synchronize()

    def release(self) -> None:
        """Let others use it."""
        self._taken = False

    def give(self, tensor: torch.Tensor) -> None:
        """Begin to copy what lies here into ``tensor``; work that is enqueued later sees it."""
        tensor.copy_(self.memory.view(tensor.shape), non_blocking=True)
        self._copied.record()
        self.release()


class _OnGPU:
    """A collective on pinned memory."""

    def __init__(self, handle: Handle, pinned: _Pinned, tensor: torch.Tensor) -> None:
        self._handle, self._pinned, self._tensor = handle, pinned, tensor

    def wait(self) -> torch.Tensor:
        """Return the result, on the GPU."""
        result = self._handle.wait()
        if result.ctypes.data == self._pinned.memory.data_ptr():
            self._pinned.give(self._tensor)
            return self._tensor
        self._pinned.release()
        return _tensor(result).to(self._tensor.device)


def _array(tensor: torch.Tensor) -> np.ndarray:
    """Return the array that shares a contiguous CPU tensor's memory."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _tensor(array: np.ndarray) -> torch.Tensor:
    """Return the tensor that shares an array's memory."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
