"""Chunk-wise top-k with 2-bit values and decayed error feedback: what SparseLoCo sends (Sarfi et al. 2025)."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np
from keras import ops

from hvdlm.config import CompressionConfig
from hvdlm.protocols.compressor import Reduced, Request
from hvdlm.protocols.types import Tensor
from hvdlm_compression.bits import pack, unpack
from hvdlm_compression.compressor import Compressor, blocks
from hvdlm_compression.tensor_ops import sparse

MOST = 4096
"""Elements of a chunk at most: an index has 12 bits."""
DECAY = 0.95
"""Of the error in every round, unless ``communication.compression.error_decay`` is set (beta of algorithm 1)."""


class ChunkedTopK(Compressor):
    """Sends the elements of largest magnitude of every chunk: their indices in 12 bits, their values in 2.

    A value is a sign and one of two magnitudes of its chunk, the means of those above and below the mean. The error,
    e = d e + x - C(d e + x) with the decay d, takes the place of an outer momentum (algorithm 1).
    """

    default_block = MOST
    default_ratio = 1 / 64
    feeds_back = True

    def __init__(self, settings: CompressionConfig, seed: int = 1, group_rank: int = 0, ranks: int = 1) -> None:
        super().__init__(settings, seed, group_rank, ranks)
        self._decay = DECAY if settings.error_decay is None else settings.error_decay

    def _sent(self) -> int:
        """Return the number of elements of a chunk that are sent: a multiple of four, whose codes fill bytes."""
        return min(self.block, max(4, 4 * round(self.block * self.ratio / 4)))

    def compress(self, tensor: Tensor, step: Tensor) -> Sequence[Tensor]:
        """Return [magnitudes float32 ``[2 chunks]``, indices uint8 ``[chunks, 3 k / 2]``, codes ``[chunks, k / 4]``].

        k elements are sent of each chunk.
        """
        rows = blocks(tensor, self.block)
        _, indices = ops.top_k(ops.abs(rows), self._sent(), sorted=False)
        indices = ops.cast(indices, "int32")
        values = ops.take_along_axis(rows, indices, axis=1)
        sizes = ops.abs(values)
        high = ops.cast(sizes > ops.mean(sizes, axis=1, keepdims=True), "float32")
        upper = ops.sum(sizes * high, axis=1) / ops.maximum(ops.sum(high, axis=1), 1.0)
        lower = ops.sum(sizes * (1.0 - high), axis=1) / ops.maximum(ops.sum(1.0 - high, axis=1), 1.0)
        codes = 2.0 * high + ops.cast(values >= 0.0, "float32")
        return [ops.reshape(ops.stack([lower, upper], axis=1), (-1,)), _pack_indices(indices), pack(codes, 2)]

    def decompress(self, payload: Sequence[Tensor], shape: tuple[int, ...], step: Tensor) -> Tensor:
        """Return float32 ``[n]``, zero except at the indices."""
        magnitudes, indices, codes = payload
        numbers = unpack(codes, 2)  # [chunks, k]
        high = ops.floor(numbers * 0.5)
        signs = 2.0 * (numbers - 2.0 * high) - 1.0
        pairs = ops.reshape(magnitudes, (-1, 2))
        values = signs * (pairs[:, :1] + high * (pairs[:, 1:] - pairs[:, :1]))
        chunks = indices.shape[0]
        starts = ops.convert_to_tensor((np.arange(chunks, dtype=np.int32) * self.block)[:, None])
        flat = ops.reshape(_unpack_indices(indices) + starts, (-1,))
        return sparse(ops.reshape(values, (-1,)), flat, chunks * self.block)[: shape[0]]

    def memory(self, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Return the decayed error, of ``shape``."""
        return {"decayed_error": np.zeros(shape, np.float32)}

    def reduce(
        self, tensor: Tensor, memory: Mapping[str, Any], step: Tensor
    ) -> Generator[Request, list[Tensor], Reduced]:
        """Sum sparsified tensors in one round."""
        shape = tuple(tensor.shape)
        corrected = ops.convert_to_tensor(memory["decayed_error"]) * self._decay + tensor
        payload = list(self.compress(corrected, step))
        memory["decayed_error"].assign(corrected - self.decompress(payload, shape, step))
        gathered = yield Request("all_gather", payload)
        return self.add_up(gathered, shape, step), lambda: self.decompress(payload, shape, step)


def _pack_indices(indices: Tensor) -> Tensor:
    """Return uint8 ``[chunks, 3 k / 2]`` from int32 ``[chunks, k]`` below 4,096: two indices in three bytes."""
    first, second = indices[:, 0::2], indices[:, 1::2]
    low, middle = ops.mod(first, 256), ops.floor_divide(first, 256) + 16 * ops.mod(second, 16)
    triples = ops.stack([low, middle, ops.floor_divide(second, 16)], axis=2)
    return ops.cast(ops.reshape(triples, (indices.shape[0], -1)), "uint8")


def _unpack_indices(packed: Tensor) -> Tensor:
    """Return the indices that ``_pack_indices`` packed, int32 ``[chunks, k]``."""
    triples = ops.cast(ops.reshape(packed, (packed.shape[0], -1, 3)), "int32")
    low, middle, high = triples[:, :, 0], triples[:, :, 1], triples[:, :, 2]
    first, second = low + 256 * ops.mod(middle, 16), ops.floor_divide(middle, 16) + 16 * high
    return ops.reshape(ops.stack([first, second], axis=2), (packed.shape[0], -1))
