"""PowerSGD: a matrix is sent as two low-rank factors, warm-started from the last step (Vogels et al. 2019)."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

import numpy as np
from keras import ops

from hvdlm.protocols.compressor import Reduced, Request
from hvdlm.protocols.types import Tensor
from hvdlm_compression.compressor import Compressor


class PowerSGD(Compressor):
    """One step of subspace iteration (algorithm 1): P = M Q, orthogonalised, then Q = M^T P; both are all-reduced."""

    matrices = True
    replicated = ("factor",)

    def payload_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of both factors; those of the whole matrix where its own rank is lower than the factors'."""
        rank = self.settings.rank
        return 4 * rank * sum(shape) if rank <= min(shape) else 4 * shape[0] * shape[1]

    def memory(self, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Return the initial right factor ``[columns, rank]``: random, equal on all ranks."""
        random = np.random.Generator(np.random.Philox(key=self.seed))
        return {"factor": random.normal(size=(shape[1], self.settings.rank)).astype(np.float32)}

    def reduce(
        self, tensor: Tensor, memory: Mapping[str, Any], step: Tensor
    ) -> Generator[Request, list[Tensor], Reduced]:
        """Sum the factors in two rounds."""
        initial = ops.convert_to_tensor(self.memory(tuple(tensor.shape))["factor"])
        previous = ops.convert_to_tensor(memory["factor"])
        # A zero gradient gives a zero factor, and with it every later product would be zero.
        factor = ops.where(ops.any(previous != 0.0), previous, initial)
        (left,) = yield Request("all_reduce", [ops.matmul(tensor, factor)])  # [rows, rank]
        left = orthogonal(left)
        local_right = ops.matmul(ops.transpose(tensor), left)  # [columns, rank]
        (right,) = yield Request("all_reduce", [local_right])
        memory["factor"].assign(right)
        return ops.matmul(left, ops.transpose(right)), lambda: ops.matmul(left, ops.transpose(local_right))


def orthogonal(matrix: Tensor) -> Tensor:
    """Return ``matrix`` ``[rows, rank]`` with orthonormal columns, by modified Gram-Schmidt.

    A column that is linearly dependent on those before it becomes zero: what remains of it are rounding errors, whose
    direction is arbitrary, so that normalised it would not be orthogonal to the others.
    """
    columns: list[Tensor] = []
    for index in range(matrix.shape[1]):
        column = matrix[:, index]
        before = ops.sum(column * column)
        for other in columns:
            column = column - ops.sum(column * other) * other
        after = ops.sum(column * column)
        columns.append(column * ops.where(after > 1e-9 * before, ops.rsqrt(ops.maximum(after, 1e-38)), 0.0))
    return ops.stack(columns, axis=1)
