"""QSGD: few bits an element, rounded at random (Alistarh et al. 2017)."""

from __future__ import annotations

from collections.abc import Sequence

from keras import ops

from hvdlm.protocols.types import Tensor
from hvdlm_compression.base import Compressor, blocks
from hvdlm_compression.bits import pack, unpack
from hvdlm_compression.noise import dither


class QSGD(Compressor):
    """Q(x) = ||x||_2 sign(x) xi, xi being |x| / ||x||_2 rounded at random to one of s levels (section 3.1, eq. 4).

    By blocks ("buckets", section 4), each with its own norm; ``bits`` hold the sign and s = 2 ** (bits - 1) - 1 levels
    in fixed width, without the paper's Elias code. Unbiased: E Q(x) = x.
    """

    biased = False
    default_block = 64  # of 256, four bits leave a norm's coarse steps: 0.04 nats more (docs/compression.md)

    def bits(self) -> int:
        """Return the bits of an element, its sign included."""
        return self.settings.bits

    def scale(self, rows: Tensor) -> Tensor:
        """Return ``[blocks, 1]``: what the highest level stands for."""
        return ops.sqrt(ops.sum(rows * rows, axis=1, keepdims=True))

    def compress(self, tensor: Tensor, step: Tensor) -> Sequence[Tensor]:
        """Return [scales float32 ``[blocks]``, levels uint8 ``[blocks, block * bits / 8]``]."""
        levels = 2 ** (self.bits() - 1) - 1
        rows = blocks(tensor, self.block)
        scales = self.scale(rows)
        inverse = ops.where(scales > 0.0, levels / ops.maximum(scales, 1e-38), 0.0)
        # Rounding x + level is rounding |x| at random: either neighbour, with the probability of its nearness.
        chance = dither(rows.shape[0], rows.shape[1], step, self.seed * 65537 + self.place)
        chosen = ops.clip(ops.floor(rows * inverse + levels + chance), 0.0, 2.0 * levels)
        return [ops.reshape(scales, (-1,)), pack(chosen, self.bits())]

    def decompress(self, payload: Sequence[Tensor], shape: tuple[int, ...], step: Tensor) -> Tensor:
        """Return float32 ``[n]``."""
        levels = 2 ** (self.bits() - 1) - 1
        scales, packed = payload
        steps = unpack(packed, self.bits()) - levels
        return ops.reshape(steps * ops.expand_dims(scales * (1.0 / levels), -1), (-1,))[: shape[0]]
