"""What compressors share: most need only ``compress`` and ``decompress``."""

from __future__ import annotations

import math
from collections.abc import Generator, Hashable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from keras import ops

from hvdlm.config import CompressionConfig
from hvdlm.protocols.compressor import Reduced, Request
from hvdlm.protocols.types import Tensor


class Compressor:
    """Sends ``compress(tensor)`` to all ranks, adds up what ``decompress`` makes of it.

    Attributes:
        collective: all_reduce where payloads add up, all_gather where every rank has to decompress them all.
        default_block: elements that share a scale where ``communication.compression.block`` doesn't say.
        matrices, biased, feeds_back: see ``interfaces.Compressor``.
    """

    collective: Literal["all_reduce", "all_gather"] = "all_gather"
    default_block = 256
    matrices = False
    biased = True
    feeds_back = False

    def __init__(self, settings: CompressionConfig, seed: int = 1, place: int = 0, ranks: int = 1) -> None:
        self.settings, self.seed, self.place, self.ranks = settings, seed, place, ranks
        self.block = settings.block or self.default_block

    def begin(self, step: int) -> Hashable:
        """Return the one phase there is; see ``interfaces.Compressor``."""
        return None

    def compress(self, tensor: Tensor, step: Tensor) -> Sequence[Tensor]:
        """Return the payload of float32 ``tensor``: tensors whose shapes and dtypes follow from its shape.

        ``step`` is a scalar int32 tensor, from which random numbers follow.
        """
        raise NotImplementedError

    def decompress(self, payload: Sequence[Tensor], shape: tuple[int, ...], step: Tensor) -> Tensor:
        """Return float32 of ``shape`` from a payload, or from the sum of all ranks' payloads (all_reduce)."""
        raise NotImplementedError

    def add_up(self, payloads: Sequence[Tensor], shape: tuple[int, ...], step: Tensor) -> Tensor:
        """Return the sum of all ranks' decompressed tensors from payloads ``[ranks, ...]``."""
        total = self.decompress([part[0] for part in payloads], shape, step)
        for rank in range(1, self.ranks):
            total = total + self.decompress([part[rank] for part in payloads], shape, step)
        return total

    def payload_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of the payload of a tensor of ``shape``."""
        payload = self.compress(ops.zeros(shape, "float32"), ops.zeros((), "int32"))
        return sum(math.prod(part.shape) * itemsize(part) for part in payload)

    def memory(self, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Return nothing: compression remembers nothing but the engine's error feedback."""
        return {}

    def reduce(
        self, tensor: Tensor, memory: Mapping[str, Any], step: Tensor
    ) -> Generator[Request, list[Tensor], Reduced]:
        """Make one round of ``compress`` and ``decompress``; see ``interfaces.Compressor``."""
        shape = tuple(tensor.shape)
        payload = list(self.compress(tensor, step))
        answer = yield Request(self.collective, payload)
        sums = self.collective == "all_reduce"
        total = self.decompress(answer, shape, step) if sums else self.add_up(answer, shape, step)
        return total, lambda: self.decompress(payload, shape, step)


def itemsize(tensor: Tensor) -> int:
    """Return the bytes of one element."""
    from keras import backend

    name = backend.standardize_dtype(tensor.dtype)
    return {"bfloat16": 2}.get(name) or np.dtype(name).itemsize


def blocks(tensor: Tensor, width: int) -> Tensor:
    """Return flat ``[n]`` as ``[ceil(n / width), width]``, the end filled with zeros."""
    missing = -tensor.shape[0] % width
    padded = ops.pad(tensor, [[0, missing]]) if missing else tensor
    return ops.reshape(padded, (-1, width))
