"""What autograd keeps for the backward pass, measured: once, in a run's first step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch


class _Kept:
    """A saved tensor; it counts as long as autograd holds it."""

    def __init__(self, tensor: torch.Tensor, storages: dict[int, list[int]], totals: list[int]) -> None:
        self.tensor, self._storages, self._totals = tensor, storages, totals
        storage = tensor.untyped_storage()
        self._key = storage.data_ptr()
        entry = storages.setdefault(self._key, [0, storage.nbytes()])
        if entry[0] == 0:
            totals[0] += entry[1]
            totals[1] = max(totals[1], totals[0])
        entry[0] += 1

    def __del__(self) -> None:
        entry = self._storages[self._key]
        entry[0] -= 1
        if entry[0] == 0:
            self._totals[0] -= entry[1]
            del self._storages[self._key]


@contextlib.contextmanager
def kept_bytes(meter: Any, parameters: Iterable[torch.Tensor]) -> Iterator[None]:
    """Set ``meter._kept`` to the most bytes that were kept at once for a backward pass, unless it is known already."""
    if meter._kept is not None:
        yield
        return
    own = {p.untyped_storage().data_ptr() for p in parameters}
    storages: dict[int, list[int]] = {}
    totals = [0, 0]

    def pack(tensor: torch.Tensor) -> Any:
        if tensor.untyped_storage().data_ptr() in own or tensor.untyped_storage().nbytes() == 0:
            return tensor
        return _Kept(tensor, storages, totals)

    def unpack(kept: Any) -> torch.Tensor:
        return kept.tensor if isinstance(kept, _Kept) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
    meter._kept = totals[1]
