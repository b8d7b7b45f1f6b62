"""A group in which every member sends what this rank sends: a compressor's computation without its communication."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from keras import backend, ops

from hvdlm.protocols.group import BlockingForms, Done
from hvdlm.protocols.types import Tensor, Traffic
from hvdlm_compression.compressor import itemsize


class EchoGroup(BlockingForms):
    """A group of ``size`` members on this rank alone. ``sent``: bytes by (operation and dtype, round)."""

    def __init__(self, size: int) -> None:
        self.ranks = tuple(range(size))
        self.traffic: dict[str, Traffic] = {}
        self.sent: Counter[tuple[str, int]] = Counter()

    def _count(self, operation: str, tensor: Tensor, name: str) -> None:
        """Count the bytes; ``name``: ``gradients.BUCKET.ROUND.NUMBER``, or ``gradients.BUCKET`` of a plain sum."""
        words = name.split(".")
        dtype = backend.standardize_dtype(tensor.dtype)
        size = math.prod(tensor.shape) * itemsize(tensor)
        self.sent[f"{operation} {dtype}", int(words[2]) if len(words) > 2 else 0] += size

    def all_reduce_async(self, tensor: Tensor, name: str, op: str = "sum") -> Done:
        """Return the tensor."""
        self._count("all_reduce", tensor, name)
        return Done(tensor)

    def all_gather_async(self, tensor: Tensor, name: str) -> Done:
        """Return as many copies as there are members."""
        self._count("all_gather", tensor, name)
        return Done(ops.concatenate([tensor] * len(self.ranks)))

    def all_to_all_async(self, tensor: Tensor, name: str) -> Done:
        """Return the first chunk of every member: as many copies of it."""
        self._count("all_to_all", tensor, name)
        chunk = tensor[: tensor.shape[0] // len(self.ranks)]
        return Done(ops.concatenate([chunk] * len(self.ranks)))

    def reduce_scatter_async(self, tensor: Tensor, name: str) -> Done:
        """Return the first chunk."""
        self._count("reduce_scatter", tensor, name)
        return Done(tensor[: tensor.shape[0] // len(self.ranks)])

    def broadcast_async(self, tensor: Any, root: int, name: str) -> Done:
        """Return the tensor."""
        return Done(tensor)

    def barrier(self) -> None:
        """Return at once."""
