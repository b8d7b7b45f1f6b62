"""The bytes that autograd keeps for the backward pass on a rank's device, measured in a run's first step."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator
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


class ActivationMemory:
    """Counts what is saved for backward passes.

    Attributes:
        count: of what is on the rank's device.
        offload: keeps saved tensors elsewhere; None: nothing does.
    """

    def __init__(self) -> None:
        self.count = StorageCount()
        self.offload: Offload | None = None
        self._measured = False
        self._parameters: set[int] | None = None  # addresses of their storages, which stay the same

    @property
    def bytes(self) -> int:
        """The most at once; 0 before the first forward pass."""
        return self.count.peak

    @contextlib.contextmanager
    def forward(self, parameters: Iterable[torch.Tensor], gathered: Collection[int] = ()) -> Iterator[None]:
        """Measure the first forward pass that is computed inside; ``parameters`` don't count.

        ``gathered``: the addresses of parameters that come and go meanwhile, which don't count either.
        Only the first: the hooks run in Python for every tensor that is saved. An offload gets those of all.
        """
        if self._measured and self.offload is None:
            yield
            return
        if self._parameters is None:
            self._parameters = {p.untyped_storage().data_ptr() for p in parameters}
        not_counted, offload, measured = self._parameters, self.offload, self._measured

        def pack(tensor: torch.Tensor) -> torch.Tensor | Saved:
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
            if address in not_counted or address in gathered or storage.nbytes() == 0:
                return tensor
            saved = offload.pack(tensor) if offload else None
            return saved or (tensor if measured else _SavedTensor(tensor, self.count))

        def unpack(saved: torch.Tensor | Saved) -> torch.Tensor:
            return saved if isinstance(saved, torch.Tensor) else saved.unpack()

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
        self._measured = True


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


class _SavedTensor:
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
