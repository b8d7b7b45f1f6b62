"""Top-k: only the elements of largest magnitude travel (Aji and Heafield 2017; Stich et al. 2018, def. 2.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from keras import ops

from hvdlm.interfaces import Tensor
from hvdlm_compression.base import Compressor, blocks

RATIO = 0.01
_WIDEST = 32768  # places have to fit into int16


class TopK(Compressor):
    """Sends values and their places in a block, 6 bytes an element, by all-gather: ranks choose different places.

    The k largest of every block, not of the whole vector: an adaptive optimizer gives parameters of small gradients the
    same say as others, and among all elements their turn would hardly ever come.

    Contraction (Stich et al. 2018, eq. 7), by block and so in sum: ||x - C(x)||^2 <= (1 - k/n) ||x||^2.
    """

    def compress(self, tensor: Tensor, step: Tensor) -> Sequence[Tensor]:
        """Return [values float32 ``[blocks, k]``, places int16 ``[blocks, k]``]."""
        return sparse(tensor, self.settings.ratio or RATIO)

    def decompress(self, payload: Sequence[Tensor], shape: tuple[int, ...], step: Tensor) -> Tensor:
        """Return float32 ``[n]``, zero but at the places."""
        return scattered(payload, shape[0], self.settings.ratio or RATIO)

    def add_up(self, payloads: Sequence[Tensor], shape: tuple[int, ...], step: Tensor) -> Tensor:
        """Return the sum at once: values with the same place add up."""
        return self.decompress(payloads, shape, step)


def widths(count: int, ratio: float) -> tuple[int, int]:
    """Return (elements of a block, how many of them travel): a power of two, so that 16 or more do."""
    width = min(_WIDEST, 2 ** math.ceil(math.log2(16 / ratio)), count)
    return width, max(1, round(width * ratio))


def sparse(tensor: Tensor, ratio: float) -> list[Tensor]:
    """Return [values float32 ``[blocks, k]``, places int16 ``[blocks, k]``] of the largest of flat ``[n]``."""
    width, chosen = widths(tensor.shape[0], ratio)
    rows = blocks(tensor, width)
    _, places = ops.top_k(ops.abs(rows), chosen, sorted=False)
    return [ops.take_along_axis(rows, places, axis=1), ops.cast(places, "int16")]


def scattered(payload: Sequence[Tensor], count: int, ratio: float) -> Tensor:
    """Return float32 ``[count]`` with values ``[..., blocks, k]`` at their places, those with the same place summed."""
    width, _ = widths(count, ratio)
    rows = -(-count // width)
    places = ops.cast(payload[1], "int32") + ops.reshape(ops.arange(0, rows * width, width, dtype="int32"), (rows, 1))
    whole = ops.segment_sum(ops.reshape(payload[0], (-1,)), ops.reshape(places, (-1,)), num_segments=rows * width)
    return whole[:count]
