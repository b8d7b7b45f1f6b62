"""PowerSGD: a matrix travels as two thin factors (Vogels et al. 2019, algorithm 1), from last step's factor on."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

import numpy as np
from keras import ops

from hvdlm.protocols.compressor import Reduced, Request
from hvdlm.protocols.types import Tensor
from hvdlm_compression.base import Compressor


class PowerSGD(Compressor):
    """One step of subspace iteration: P = M Q, orthogonalised, then Q = M^T P; both are all-reduced."""

    matrices = True

    def payload_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of both factors; those of a rank that the matrix doesn't have never gain."""
        rank = self.settings.rank
        return 4 * rank * sum(shape) if rank <= min(shape) else 4 * shape[0] * shape[1]

    def memory(self, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Return the right factor ``[columns, rank]``, random and the same on all ranks."""
        random = np.random.Generator(np.random.Philox(key=self.seed))
        return {"factor": random.normal(size=(shape[1], self.settings.rank)).astype(np.float32)}

    def reduce(
        self, tensor: Tensor, memory: Mapping[str, Any], step: Tensor
    ) -> Generator[Request, list[Tensor], Reduced]:
        """Sum in two rounds; see ``interfaces.Compressor``."""
        start = ops.convert_to_tensor(self.memory(tuple(tensor.shape))["factor"])
        known = ops.convert_to_tensor(memory["factor"])
        # A gradient that was zero leaves a factor that is zero: it would stay so for ever.
        factor = ops.where(ops.any(known != 0.0), known, start)
        (left,) = yield Request("all_reduce", [ops.matmul(tensor, factor)])  # [rows, rank]
        left = orthogonal(left)
        own = ops.matmul(ops.transpose(tensor), left)  # [columns, rank]
        (right,) = yield Request("all_reduce", [own])
        memory["factor"].assign(right)
        return ops.matmul(left, ops.transpose(right)), lambda: ops.matmul(left, ops.transpose(own))


def orthogonal(matrix: Tensor) -> Tensor:
    """Return ``matrix`` ``[rows, rank]`` with orthonormal columns, by modified Gram-Schmidt.

    A column of which the others leave nothing but rounding errors becomes zero: they point anywhere, and what is not
    orthogonal is no projection.
    """
    done: list[Tensor] = []
    for index in range(matrix.shape[1]):
        column = matrix[:, index]
        before = ops.sum(column * column)
        for other in done:
            column = column - ops.sum(column * other) * other
        after = ops.sum(column * column)
        done.append(column * ops.where(after > 1e-9 * before, ops.rsqrt(ops.maximum(after, 1e-38)), 0.0))
    return ops.stack(done, axis=1)
