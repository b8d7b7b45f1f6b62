"""Tensors that autograd saves for backward passes: what stands for them, and the bytes of their storages.

Without a twin: what TensorFlow keeps follows from the edges of a graph.
"""

from __future__ import annotations

from typing import Protocol

import torch


class Saved(Protocol):
    """What stands for a tensor that autograd has saved."""

    def unpack(self) -> torch.Tensor:
        """Return the tensor, for a backward pass."""


class Offload(Protocol):
    """Keeps saved tensors elsewhere until their backward pass."""

    def pack(self, tensor: torch.Tensor) -> Saved | None:
        """Return what stands for ``tensor``; None: it stays."""


class StorageCount:
    """Bytes of the storages that saved tensors share. ``peak``: the most at once."""

    def __init__(self) -> None:
        self.peak = 0
        self._bytes = 0
        self._references: dict[int, int] = {}

    def add(self, storage: torch.UntypedStorage) -> None:
        """Count a tensor of ``storage``."""
        key = storage.data_ptr()
        self._references[key] = self._references.get(key, 0) + 1
        if self._references[key] == 1:
            self._bytes += storage.nbytes()
            self.peak = max(self.peak, self._bytes)

    def remove(self, key: int, size: int) -> None:
        """Count a tensor less of the storage of ``size`` bytes at address ``key``."""
        self._references[key] -= 1
        if self._references[key] == 0:
            del self._references[key]
            self._bytes -= size


class CountedTensor:
    """A tensor that autograd has saved; it counts until autograd drops it."""

    def __init__(self, tensor: torch.Tensor, count: StorageCount) -> None:
        self._tensor = tensor
        self._count = count
        storage = tensor.untyped_storage()
        self._key, self._size = storage.data_ptr(), storage.nbytes()
        count.add(storage)

    def unpack(self) -> torch.Tensor:
        """Return the tensor."""
        return self._tensor

    def __del__(self) -> None:
        self._count.remove(self._key, self._size)
