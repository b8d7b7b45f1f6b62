"""Collectives through host memory, for transports that know arrays only (backend mpi4py).

A CPU tensor shares its memory with the array, in which sums take place. A GPU tensor is copied into pinned memory while
the caller continues: the transport's thread waits for the copy, and the result is copied back into the tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np
import torch
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from hvdlm.protocols.framework import HostCollective
from hvdlm.protocols.group import Handle


class HostTensors:
    """Implements ``HostTensors``."""

    def __init__(self) -> None:
        self._pinned: dict[tuple[int, torch.dtype], list[_PinnedBuffer]] = {}

    def through(self, tensor: torch.Tensor, collective: HostCollective, shape: tuple[int | None, ...]) -> Handle:
        """Start ``collective`` on the values of ``tensor``."""
        if tensor.is_cuda:
            return self._through_pinned(tensor.detach(), collective)
        dense = tensor.detach().contiguous()
        array = _array(dense)
        return _OnCPU(collective(array, None), array, dense, tensor)

    def together(self, tensors: Sequence[torch.Tensor], collective: HostCollective) -> Handle:
        """Start ``collective`` once, on the values of all ``tensors`` in one flat array."""
        flat = _flatten_dense_tensors(tensors)
        return _Together(self.through(flat, collective, tuple(flat.shape)), tensors)

    def _through_pinned(self, tensor: torch.Tensor, collective: HostCollective) -> Handle:
        # Pinning is slow, so that buffers are reused; a step starts several collectives of the same size.
        pool = self._pinned.setdefault((tensor.numel(), tensor.dtype), [])
        buffer = next((p for p in pool if p.free()), None)
        if buffer is None:
            buffer = _PinnedBuffer(tensor)
            pool.append(buffer)
        return _OnGPU(collective(buffer.fill(tensor), buffer.wait_until_filled), buffer, tensor)


class _OnCPU:
    """A collective on ``array``, which shares the memory of ``dense``: of ``tensor``, or of its contiguous copy."""

    def __init__(self, handle: Handle, array: np.ndarray, dense: torch.Tensor, tensor: torch.Tensor) -> None:
        self._handle = handle
        self._array = array
        self._dense = dense
        self._tensor = tensor

    def wait(self) -> torch.Tensor:
        """Return the result."""
        result = self._handle.wait()
        if result is not self._array:
            return _tensor(result)
        if self._dense.data_ptr() != self._tensor.data_ptr():
            with torch.no_grad():
                self._tensor.copy_(self._dense)
        return self._tensor


class _Together:
    """A collective on several tensors as one."""

    def __init__(self, handle: Handle, tensors: Sequence[torch.Tensor]) -> None:
        self._handle = handle
        self._tensors = tensors

    def wait(self) -> list[torch.Tensor]:
        """Return the results."""
        return list(_unflatten_dense_tensors(self._handle.wait(), self._tensors))


class _OnGPU:
    """A collective on a pinned buffer."""

    def __init__(self, handle: Handle, buffer: _PinnedBuffer, tensor: torch.Tensor) -> None:
        self._handle = handle
        self._buffer = buffer
        self._tensor = tensor

    def wait(self) -> torch.Tensor:
        """Return the result, on the GPU."""
        result = self._handle.wait()
        if result.ctypes.data == self._buffer.memory.data_ptr():
            self._buffer.copy_to(self._tensor)
            return self._tensor
        self._buffer.release()
        return _tensor(result).to(self._tensor.device)


class _PinnedBuffer:
    """Page-locked host memory of a tensor's size, from and to which a GPU copies asynchronously."""

    def __init__(self, like: torch.Tensor) -> None:
        self.memory = torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
        self._copied = torch.cuda.Event(blocking=True)  # waiting for it sleeps instead of spinning
        self._in_use = False

    def free(self) -> bool:
        """Return whether no copy into or out of it is under way."""
        return not self._in_use and self._copied.query()

    def fill(self, tensor: torch.Tensor) -> np.ndarray:
        """Start to copy ``tensor`` here; return the array, valid once ``wait_until_filled`` has returned."""
        self._in_use = True
        self.memory = self.memory.view(tensor.shape)
        self.memory.copy_(tensor, non_blocking=True)
        self._copied.record()
        return _array(self.memory)

    def wait_until_filled(self) -> None:
        """Wait for the copy that ``fill`` has started."""
        self._copied.synchronize()

    def copy_to(self, tensor: torch.Tensor) -> None:
        """Start to copy the buffer into ``tensor``, before the GPU's work that is enqueued later; release it."""
        tensor.copy_(self.memory.view(tensor.shape), non_blocking=True)
        self._copied.record()
        self.release()

    def release(self) -> None:
        """Allow other collectives to use the buffer."""
        self._in_use = False


def _array(tensor: torch.Tensor) -> np.ndarray:
    """Return the array that shares a contiguous CPU tensor's memory."""
    if tensor.dtype == torch.bfloat16:  # numpy() doesn't know it
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _tensor(array: np.ndarray) -> torch.Tensor:
    """Return the tensor that shares an array's memory, unless it can't be written or isn't contiguous."""
    if not (array.flags.c_contiguous and array.flags.writeable):
        array = array.copy()
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
