"""Top-k: only the k elements of largest magnitude travel (Aji and Heafield 2017; Stich et al. 2018, def. 2.1)."""

from __future__ import annotations

from collections.abc import Sequence

from keras import ops

from hvdlm.protocols.types import Tensor
from hvdlm_compression.base import Compressor


class TopK(Compressor):
    """Sends values and their places, 8 bytes an element, by all-gather: ranks choose different places.

    Contraction (Stich et al. 2018, eq. 7): ||x - C(x)||^2 <= (1 - k/n) ||x||^2.
    """

    def compress(self, tensor: Tensor, step: Tensor) -> Sequence[Tensor]:
        """Return [values float32 ``[k]``, places int32 ``[k]``]."""
        places = largest(tensor, self.settings.ratio or 0.01)
        return [ops.take(tensor, places), places]

    def decompress(self, payload: Sequence[Tensor], shape: tuple[int, ...], step: Tensor) -> Tensor:
        """Return float32 ``[n]``, zero but at the places."""
        return ops.segment_sum(payload[0], payload[1], num_segments=shape[0])

    def add_up(self, payloads: Sequence[Tensor], shape: tuple[int, ...], step: Tensor) -> Tensor:
        """Return the sum at once: values with the same place add up."""
        return self.decompress([ops.reshape(part, (-1,)) for part in payloads], shape, step)


def share(count: int, ratio: float) -> int:
    """Return how many of ``count`` elements a share of ``ratio`` is: one at least."""
    return max(1, round(count * ratio))


def largest(tensor: Tensor, ratio: float) -> Tensor:
    """Return int32 ``[k]``: the places of the elements of largest magnitude, in no order."""
    _, places = ops.top_k(ops.abs(tensor), share(tensor.shape[0], ratio), sorted=False)
    return ops.cast(places, "int32")
