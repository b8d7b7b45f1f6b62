"""PowerSGD: a matrix is sent as two low-rank factors, warm-started from the last step (Vogels et al. 2019)."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

import numpy as np
from keras import ops

from hvdlm.config import CompressionConfig
from hvdlm.protocols.compressor import Reduced, Request
from hvdlm.protocols.types import Tensor
from hvdlm_compression.compressor import Compressor


class PowerSGD(Compressor):
    """One step of subspace iteration (algorithm 1): P = M Q, orthogonalised, then Q = M^T P; both are all-reduced."""

    matrices = True
    replicated = ("right",)

    def __init__(self, settings: CompressionConfig, seed: int = 1, group_rank: int = 0, ranks: int = 1) -> None:
        super().__init__(settings, seed, group_rank, ranks)
        self._initial: dict[int, np.ndarray] = {}  # by columns

    def payload_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of both factors: more than the matrix has where its own rank is lower than the factors'."""
        return 4 * self.settings.rank * sum(shape)

    def memory(self, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Return the initial right factor, transposed ``[rank, columns]``: random, equal on all ranks."""
        if shape[1] not in self._initial:
            random = np.random.Generator(np.random.Philox(key=self.seed))
            normal = random.normal(size=(shape[1], self.settings.rank)).astype(np.float32)
            self._initial[shape[1]] = np.ascontiguousarray(normal.T)
        return {"right": self._initial[shape[1]]}

    def reduce(
        self, tensor: Tensor, memory: Mapping[str, Any], step: Tensor
    ) -> Generator[Request, list[Tensor], Reduced]:
        """Sum the factors in two rounds.

        The right factor is kept and computed as rows: CPUs multiply by few columns several times more slowly.
        """
        initial = ops.convert_to_tensor(self.memory(tuple(tensor.shape))["right"])
        previous = ops.convert_to_tensor(memory["right"])
        # A zero gradient gives a zero factor, and with it every later product would be zero.
        factor = ops.where(ops.any(previous != 0.0), previous, initial)
        (left,) = yield Request("all_reduce", [ops.matmul(tensor, ops.transpose(factor))])  # [rows, rank]
        left = orthogonal(left)
        local_right = ops.matmul(ops.transpose(left), tensor)  # [rank, columns]
        (right,) = yield Request("all_reduce", [local_right])
        memory["right"].assign(right)
        return ops.matmul(left, right), lambda: ops.matmul(left, local_right)


def orthogonal(matrix: Tensor) -> Tensor:
    """Return ``matrix`` ``[rows, rank]``, rank <= rows, with orthonormal columns: those of Gram-Schmidt.

    A column that is linearly dependent on those before it becomes zero: what remains of it are rounding errors, whose
    direction is arbitrary, and another one on a rank with another processor. The first decomposition finds such
    columns. In the second one they are the last, since no other column may lose its share of that direction.
    """
    rank = matrix.shape[1]
    triangle = ops.qr(matrix)[1]
    independent = ops.abs(ops.diagonal(triangle)) > 3e-5 * ops.max(ops.abs(triangle), axis=0)
    order = ops.argsort(ops.where(independent, 0, rank) + ops.arange(rank))
    columns, triangle = ops.qr(ops.take(matrix, order, axis=1))
    signs = ops.where(ops.take(independent, order), ops.sign(ops.diagonal(triangle)), 0.0)
    return ops.take(columns * signs, ops.argsort(order), axis=1)
