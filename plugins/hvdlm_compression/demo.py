"""DeMo: of every rank's own momentum, the fast components alone are shared (Peng, Quesnelle and Kingma 2024)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
from keras import ops

from hvdlm.config import CompressionConfig
from hvdlm.protocols.compressor import Request
from hvdlm.protocols.types import Tensor
from hvdlm_compression.tensor_ops import add_sparse, sparse
from hvdlm_compression.updates import Direction

SIDE = 64  # of the square blocks that are transformed (section 4.1)
RATIO = 1 / 128  # of a block's components that are sent, unless ``communication.compression.ratio`` is set
DECAY = 0.999  # of the momentum, unless ``communication.compression.momentum`` is set


def transform(side: int) -> np.ndarray:
    """Return the orthonormal DCT-II of ``side`` values as a matrix, float32 ``[side, side]``; its transpose inverts."""
    frequency, index = np.arange(side)[:, None], np.arange(side)[None, :]
    matrix = np.cos(np.pi * (2 * index + 1) * frequency / (2 * side)) * math.sqrt(2.0 / side)
    matrix[0] /= math.sqrt(2.0)
    return matrix.astype(np.float32)


class DecoupledMomentum:
    """Algorithm 1 for one matrix: m = decay m + g; q: the largest components of each block's cosine transform of m.

    q leaves m, and is sent; what all ranks sent is averaged and transformed back, and its sign is the direction.
    Components are sent as bfloat16 with an index of 16 bits. Momenta differ between ranks: there is no error feedback
    beside them.
    """

    matrices = True
    biased = False
    feeds_back = True
    replicated: tuple[str, ...] = ("replicated_momentum",)

    def __init__(self, settings: CompressionConfig, ranks: int) -> None:
        self.ranks = ranks
        self._decay = settings.momentum or DECAY
        self._count = max(1, round((settings.ratio or RATIO) * SIDE * SIDE))
        self._matrix = transform(SIDE)

    def begin(self, step: int) -> Hashable:
        """Return the phase: every step exchanges alike."""
        return None

    def payload_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of all blocks' components and indices."""
        rows, columns = _blocks(shape)
        return 4 * rows * columns * self._count

    def memory(self, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Return the momentum: of a matrix this rank's own, of a vector, which is summed whole, that of all ranks."""
        return {"momentum" if len(shape) > 1 else "replicated_momentum": np.zeros(shape, np.float32)}

    def dense(self, gradient: Tensor, memory: Mapping[str, Any], step: Tensor) -> Direction:
        """Sum the gradient; the direction is the sign of its momentum."""
        total = (yield Request("all_reduce", [gradient]))[0] / float(self.ranks)
        momentum = ops.convert_to_tensor(memory["replicated_momentum"]) * self._decay + total
        memory["replicated_momentum"].assign(momentum)
        return ops.sign(momentum)

    def reduce(self, gradient: Tensor, memory: Mapping[str, Any], step: Tensor) -> Direction:
        """Share the largest components of the momentum of a matrix ``[rows, columns]``."""
        shape = tuple(gradient.shape)
        momentum = ops.convert_to_tensor(memory["momentum"]) * self._decay + gradient
        components = ops.reshape(self._forward(momentum, shape), (-1, SIDE * SIDE))
        indices = ops.top_k(ops.abs(components), self._count, sorted=False)[1]
        # Rounded before they leave the momentum: what is lost of them stays there.
        values = ops.cast(ops.take_along_axis(components, indices, axis=1), "bfloat16")
        memory["momentum"].assign(momentum - self._backward(_sparse(values, indices), shape))
        received = yield Request("all_gather", [values, ops.cast(indices, "int16")])
        total = _sparse(received[0][0], received[1][0])
        for rank in range(1, self.ranks):
            total = add_sparse(
                total, ops.reshape(ops.cast(received[0][rank], "float32"), (-1,)), _places(received[1][rank])
            )
        return ops.sign(self._backward(total, shape))

    def _forward(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return the transforms of a matrix's blocks, ``[blocks, side, side]``; its edges are padded with zeros."""
        rows, columns = _blocks(shape)
        padding = [[0, rows * SIDE - shape[0]], [0, columns * SIDE - shape[1]]]
        padded = ops.reshape(ops.pad(matrix, padding), (rows, SIDE, columns, SIDE))
        blocks = ops.reshape(ops.transpose(padded, (0, 2, 1, 3)), (-1, SIDE, SIDE))
        basis = ops.convert_to_tensor(self._matrix)
        return ops.matmul(ops.matmul(basis, blocks), ops.transpose(basis))

    def _backward(self, components: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return the matrix of ``shape`` whose blocks have these components ``[blocks, side * side]``."""
        rows, columns = _blocks(shape)
        basis = ops.convert_to_tensor(self._matrix)
        blocks = ops.matmul(ops.matmul(ops.transpose(basis), ops.reshape(components, (-1, SIDE, SIDE))), basis)
        ordered = ops.transpose(ops.reshape(blocks, (rows, columns, SIDE, SIDE)), (0, 2, 1, 3))
        return ops.reshape(ordered, (rows * SIDE, columns * SIDE))[: shape[0], : shape[1]]


def _blocks(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the blocks of a matrix by rows and columns."""
    if len(shape) < 2:
        return 1, 1
    return -(-shape[0] // SIDE), -(-shape[1] // SIDE)


def _sparse(values: Tensor, indices: Tensor) -> Tensor:
    """Return float32 ``[blocks * side * side]`` with ``values`` at ``indices``, both ``[blocks, n]``, and zeros."""
    size = values.shape[0] * SIDE * SIDE
    return sparse(ops.reshape(ops.cast(values, "float32"), (-1,)), _places(indices), size)


def _places(indices: Tensor) -> Tensor:
    """Return where in all blocks the components at ``indices`` ``[blocks, n]`` of each block lie: int32."""
    first = ops.convert_to_tensor((SIDE * SIDE * np.arange(indices.shape[0], dtype=np.int32))[:, None])
    return ops.reshape(ops.cast(indices, "int32") + first, (-1,))
