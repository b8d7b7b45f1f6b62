"""Base class of compressors: most of them only have to write ``compress`` and ``decompress``."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from keras import ops

from hvdlm.config import CompressionConfig
from hvdlm.protocols.compressor import Reduced, Request
from hvdlm.protocols.types import Tensor


def call_directly(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``function``; see ``Compressor.call``."""
    return function(*arguments)


@runtime_checkable
class ReducesWithError(Protocol):
    """A compressor that applies error feedback itself: in place, where the framework can overwrite tensors."""

    def reduce_with_error(
        self, tensor: Tensor, error: Any, memory: Mapping[str, Any]
    ) -> Generator[Request, list[Tensor], Tensor]:
        """As ``Compressor.reduce``, but of ``tensor + error``, from which it takes what was sent; return the sum.

        ``error``: the error feedback's Variable; None: there is none. The sum may be in the memory of ``tensor``.
        """


class Compressor:
    """Sends the payload ``compress(tensor)`` to all ranks and sums the decompressed payloads of all of them.

    Attributes:
        collective: all_reduce where payloads can be summed, all_gather where every rank has to decompress them all.
        default_block: elements that share a scale, unless ``communication.compression.block`` is set.
        default_ratio: fraction of the elements that is sent, unless ``communication.compression.ratio`` is set.
        group_rank: this rank's index in the group that exchanges gradients.
        ranks: the group's size.
        call: calls ``compress``, ``decompress`` and ``add_up``, perhaps as graphs where that is outside of a graph.
        matrices, biased, feeds_back, replicated: see ``Compressor``.
    """

    collective: Literal["all_reduce", "all_gather"] = "all_gather"
    default_block = 256
    default_ratio = 1.0
    matrices = False
    biased = True
    feeds_back = False
    replicated: tuple[str, ...] = ()
    call: Callable[..., Any] = staticmethod(call_directly)

    def __init__(self, settings: CompressionConfig, seed: int = 1, group_rank: int = 0, ranks: int = 1) -> None:
        self.settings = settings
        self.seed = seed
        self.group_rank = group_rank
        self.ranks = ranks
        self.block = settings.block or self.default_block
        self.ratio = settings.ratio or self.default_ratio

    @property
    def scatters(self) -> bool:
        """Whether ZeRO's ranks can send each other the payloads of their shards: a vector's payload is all there is."""
        return type(self).reduce is Compressor.reduce and not self.matrices

    def granule(self) -> int | None:
        """Return n where vectors of multiples of n elements may be joined: their payloads are joined along axis 0.

        None: a vector's payload depends on all of it. ZeRO then compresses the shards one by one.
        """
        return None

    def begin(self, step: int) -> Hashable:
        """Return the step's phase: every step is compressed in the same way."""
        return None

    def compress(self, tensor: Tensor, step: Tensor) -> Sequence[Tensor]:
        """Return the payload of float32 ``tensor``: tensors whose shapes and dtypes depend on its shape alone.

        Random numbers are functions of ``step``, a scalar int32 tensor.
        """
        raise NotImplementedError

    def decompress(self, payload: Sequence[Tensor], shape: tuple[int, ...], step: Tensor) -> Tensor:
        """Return float32 of ``shape`` from one rank's payload, or from the sum of all payloads (all_reduce)."""
        raise NotImplementedError

    def add_up(self, payloads: Sequence[Tensor], shape: tuple[int, ...], step: Tensor) -> Tensor:
        """Return the sum of all ranks' decompressed tensors from payloads ``[ranks, ...]``."""
        total = self.decompress([gathered[0] for gathered in payloads], shape, step)
        for rank in range(1, self.ranks):
            total = total + self.decompress([gathered[rank] for gathered in payloads], shape, step)
        return total

    def payload_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of the payload for a tensor of ``shape``."""
        payload = self.compress(ops.zeros(shape, "float32"), ops.zeros((), "int32"))
        return sum(math.prod(tensor.shape) * itemsize(tensor) for tensor in payload)

    def memory(self, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Return the initial state for a tensor of ``shape``, none by default: error feedback is the exchange's."""
        return {}

    def reduce(
        self, tensor: Tensor, memory: Mapping[str, Any], step: Tensor
    ) -> Generator[Request, list[Tensor], Reduced]:
        """Sum compressed tensors in one round."""
        shape = tuple(tensor.shape)
        payload = list(self.call(self.compress, tensor, step))
        received = yield Request(self.collective, payload)
        if self.collective == "all_reduce":
            total = self.call(self.decompress, received, shape, step)
        else:
            total = self.call(self.add_up, received, shape, step)
        return total, lambda: self.call(self.decompress, payload, shape, step)


def itemsize(tensor: Tensor) -> int:
    """Return the bytes of one element."""
    from keras import backend

    name = backend.standardize_dtype(tensor.dtype)
    return {"bfloat16": 2}.get(name) or np.dtype(name).itemsize


def blocks(tensor: Tensor, width: int) -> Tensor:
    """Return flat ``[n]`` as ``[ceil(n / width), width]``, padded with zeros."""
    missing = -tensor.shape[0] % width
    padded = ops.pad(tensor, [[0, missing]]) if missing else tensor
    return ops.reshape(padded, (-1, width))
