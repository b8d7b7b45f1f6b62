"""PowerSGD: a matrix is sent as two low-rank factors, warm-started from the last step (Vogels et al. 2019)."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

import numpy as np
from keras import ops

from hvdlm.config import CompressionConfig
from hvdlm.protocols.compressor import Reduced, Request
from hvdlm.protocols.types import Tensor
from hvdlm_compression import tensor_ops
from hvdlm_compression.compressor import Compressor

DEPENDENT = 3e-5  # share of a column's largest element that is left of it where it depends on other columns


class PowerSGD(Compressor):
    """One step of subspace iteration (algorithm 1): P = M Q, orthogonalised, then Q = M^T P; both are all-reduced."""

    matrices = True
    replicated = ("right",)

    def __init__(self, settings: CompressionConfig, seed: int = 1, group_rank: int = 0, ranks: int = 1) -> None:
        super().__init__(settings, seed, group_rank, ranks)
        self._initial: dict[int, np.ndarray] = {}  # by columns
        self._initial_factors: dict[int, Tensor] = {}

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

    def _initial_factor(self, columns: int) -> Tensor:
        """Return the initial right factor as a tensor, which is made once unless it belongs to a graph."""
        if columns in self._initial_factors:
            return self._initial_factors[columns]
        factor = ops.convert_to_tensor(self.memory((1, columns))["right"])
        if tensor_ops.OVERWRITES:
            self._initial_factors[columns] = factor
        return factor

    def reduce(
        self, tensor: Tensor, memory: Mapping[str, Any], step: Tensor
    ) -> Generator[Request, list[Tensor], Reduced]:
        """Sum the factors in two rounds."""
        left, local_right = yield from self._project(tensor, memory)
        right = yield from self._sum_right(local_right, memory)
        return left @ right, lambda: left @ local_right

    def reduce_with_error(
        self, tensor: Tensor, error: Any, memory: Mapping[str, Any]
    ) -> Generator[Request, list[Tensor], Tensor]:
        """Sum the factors of ``tensor + error`` in two rounds.

        In place, these are five passes over a gradient: its sum with the error, two products with it, the product that
        the error loses, and the one that is returned.
        """
        matrix = tensor if error is None else tensor_ops.add(ops.convert_to_tensor(error), tensor)
        left, local_right = yield from self._project(matrix, memory)
        if error is not None:  # before the second round, while a CPU may have the matrix in its cache
            tensor_ops.keep(error, tensor_ops.subtract_product(matrix, left, local_right))
        right = yield from self._sum_right(local_right, memory)
        return tensor_ops.product(tensor, left, right)

    def _project(
        self, matrix: Tensor, memory: Mapping[str, Any]
    ) -> Generator[Request, list[Tensor], tuple[Tensor, Tensor]]:
        """Return the left factor ``[rows, rank]``, orthonormal and of all ranks, and this rank's right factor.

        The right factor is kept and computed as rows, ``[rank, columns]``: CPUs multiply by few columns several times
        more slowly.
        """
        # A zero gradient gives a zero factor, and with it every later product would be zero.
        factor = tensor_ops.nonzero_or(ops.convert_to_tensor(memory["right"]), self._initial_factor(matrix.shape[1]))
        (left,) = yield Request("all_reduce", [matrix @ tensor_ops.transpose(factor)])
        left = orthogonal(left)
        return left, tensor_ops.transpose(left) @ matrix

    def _sum_right(self, local: Tensor, memory: Mapping[str, Any]) -> Generator[Request, list[Tensor], Tensor]:
        """Return the sum of the right factors, and keep it for the next step."""
        (right,) = yield Request("all_reduce", [local])
        memory["right"].assign(right)
        return right


def orthogonal(matrix: Tensor) -> Tensor:
    """Return ``matrix`` ``[rows, rank]`` with orthonormal columns: those of Gram-Schmidt.

    A column that is linearly dependent on those before it becomes zero: what remains of it are rounding errors, whose
    direction is arbitrary, and another one on a rank with another processor. The first decomposition finds such
    columns. In the second one they are the last, since no other column may lose its share of that direction.
    """
    rows, rank = matrix.shape
    if rows < rank:
        return orthogonal(ops.pad(matrix, [[0, rank - rows], [0, 0]]))[:rows]
    columns, triangle = ops.qr(matrix)
    diagonal = ops.diagonal(triangle)
    values = tensor_ops.on_host(triangle)
    if values is not None and _has_full_rank(values):
        return columns * ops.sign(diagonal)  # a second decomposition would be the same
    independent = abs(diagonal) > DEPENDENT * ops.max(abs(triangle), axis=0)
    order = ops.argsort(ops.where(independent, 0, rank) + ops.arange(rank))
    columns, triangle = ops.qr(ops.take(matrix, order, axis=1))
    signs = ops.where(ops.take(independent, order), ops.sign(ops.diagonal(triangle)), 0.0)
    return ops.take(columns * signs, ops.argsort(order), axis=1)


def _has_full_rank(triangle: np.ndarray) -> bool:
    """Return whether no column depends on those before it."""
    magnitudes = np.abs(triangle)
    return bool((magnitudes.diagonal() > DEPENDENT * magnitudes.max(0)).all())
