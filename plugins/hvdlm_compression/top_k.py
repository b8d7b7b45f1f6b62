"""Top-k: only the k elements of largest magnitude are sent (Aji and Heafield 2017; Stich et al. 2018, def. 2.1)."""

from __future__ import annotations

from collections.abc import Sequence

from keras import ops

from hvdlm.protocols.types import Tensor
from hvdlm_compression.compressor import Compressor
from hvdlm_compression.tensor_ops import add_sparse, sparse


class TopK(Compressor):
    """Sends values and indices, 8 bytes an element, by all-gather, since ranks choose different indices.

    A contraction (Stich et al. 2018, eq. 7): ||x - C(x)||^2 <= (1 - k/n) ||x||^2.
    """

    default_ratio = 0.01

    def compress(self, tensor: Tensor, step: Tensor) -> Sequence[Tensor]:
        """Return [values float32 ``[k]``, indices int32 ``[k]``]."""
        indices = largest(tensor, self.ratio)
        return [ops.take(tensor, indices), indices]

    def decompress(self, payload: Sequence[Tensor], shape: tuple[int, ...], step: Tensor) -> Tensor:
        """Return float32 ``[n]``, zero except at the indices."""
        return sparse(payload[0], payload[1], shape[0])

    def add_up(self, payloads: Sequence[Tensor], shape: tuple[int, ...], step: Tensor) -> Tensor:
        """Return the sum of all ranks' values."""
        values, indices = payloads
        total = sparse(values[0], indices[0], shape[0])
        for rank in range(1, self.ranks):
            total = add_sparse(total, values[rank], indices[rank])
        return total


def sent_count(count: int, ratio: float) -> int:
    """Return how many of ``count`` elements are sent: the fraction ``ratio``, at least one."""
    return max(1, round(count * ratio))


def largest(tensor: Tensor, ratio: float) -> Tensor:
    """Return the indices of the elements of largest magnitude, unordered: int32 ``[k]``."""
    _, indices = ops.top_k(ops.abs(tensor), sent_count(tensor.shape[0], ratio), sorted=False)
    return ops.cast(indices, "int32")
