"""The bytes that autograd keeps for the backward pass on a rank's device, measured in a run's first step."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator

import torch

from hvdlm_torch.saved_tensors import CountedTensor, Offload, Saved, StorageCount


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
            return saved or (tensor if measured else CountedTensor(tensor, self.count))

        def unpack(saved: torch.Tensor | Saved) -> torch.Tensor:
            return saved if isinstance(saved, torch.Tensor) else saved.unpack()

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
        self._measured = True
