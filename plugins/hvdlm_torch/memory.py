"""The bytes that autograd keeps for the backward pass, measured in a run's first step."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch


class ActivationMemory:
    """Counts what is saved for backward passes. ``bytes``: the most at once; 0 before the first forward pass."""

    def __init__(self) -> None:
        self.bytes = 0
        self._measured = False

    @contextlib.contextmanager
    def forward(self, parameters: Iterable[torch.Tensor], gathered: Collection[int] = ()) -> Iterator[None]:
        """Measure the first forward pass that is computed inside; ``parameters`` don't count.

        ``gathered``: the addresses of parameters that come and go meanwhile, which don't count either.
        Only the first: the hooks run in Python for every tensor that is saved.
        """
        if self._measured:
            yield
            return
        parameter_storages = {p.untyped_storage().data_ptr() for p in parameters}
        count = _StorageCount()

        def pack(tensor: torch.Tensor) -> Any:
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
            if address in parameter_storages or address in gathered or storage.nbytes() == 0:
                return tensor
            return _SavedTensor(tensor, count)

        def unpack(saved: Any) -> torch.Tensor:
            return saved.tensor if isinstance(saved, _SavedTensor) else saved

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
        self.bytes, self._measured = count.peak, True


class _StorageCount:
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


class _SavedTensor:
    """A tensor that autograd has saved; it counts until autograd drops it."""

    def __init__(self, tensor: torch.Tensor, count: _StorageCount) -> None:
        self.tensor = tensor
        self._count = count
        storage = tensor.untyped_storage()
        self._key, self._size = storage.data_ptr(), storage.nbytes()
        count.add(storage)

    def __del__(self) -> None:
        self._count.remove(self._key, self._size)
