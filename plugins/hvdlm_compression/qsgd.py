"""QSGD: quantisation to few bits with stochastic rounding (Alistarh et al. 2017)."""

from __future__ import annotations

from collections.abc import Sequence

from keras import ops

from hvdlm.protocols.types import Tensor
from hvdlm_compression.bits import pack, unpack
from hvdlm_compression.compressor import Compressor, blocks
from hvdlm_compression.noise import dither


class QSGD(Compressor):
    """Q(x) = ||x||_2 sign(x) xi, where xi is |x| / ||x||_2 stochastically rounded to one of s levels (eq. 4).

    Every block ("bucket", section 4) has its own norm; ``bits`` hold the sign and s = 2 ** (bits - 1) - 1 levels in
    fixed width, without the paper's Elias code. Unbiased: E Q(x) = x.
    """

    biased = False
    # With blocks of 256, the levels of four bits are too coarse: the loss ends 0.04 nats higher (docs/compression.md).
    default_block = 64

    def granule(self) -> int | None:
        """Return the block: each is compressed by itself."""
        return self.block

    def bits(self) -> int:
        """Return the bits of an element, its sign included."""
        return self.settings.bits

    def scale(self, rows: Tensor) -> Tensor:
        """Return the magnitude of the highest level: ``[blocks, 1]``."""
        return ops.sqrt(ops.sum(rows * rows, axis=1, keepdims=True))

    def compress(self, tensor: Tensor, step: Tensor) -> Sequence[Tensor]:
        """Return [scales float32 ``[blocks]``, levels uint8 ``[blocks, block * bits / 8]``]."""
        levels = 2 ** (self.bits() - 1) - 1
        rows = blocks(tensor, self.block)
        scales = self.scale(rows)
        inverse = ops.where(scales > 0.0, levels / ops.maximum(scales, 1e-38), 0.0)
        # Adding uniform noise before rounding down rounds to either neighbour, the nearer one more probably.
        noise = dither(rows.shape[0], rows.shape[1], step, self.seed * 65537 + self.group_rank)
        rounded = ops.clip(ops.floor(rows * inverse + levels + noise), 0.0, 2.0 * levels)
        return [ops.reshape(scales, (-1,)), pack(rounded, self.bits())]

    def decompress(self, payload: Sequence[Tensor], shape: tuple[int, ...], step: Tensor) -> Tensor:
        """Return float32 ``[n]``."""
        levels = 2 ** (self.bits() - 1) - 1
        scales, packed = payload
        steps = unpack(packed, self.bits()) - levels
        return ops.reshape(steps * ops.expand_dims(scales * (1.0 / levels), -1), (-1,))[: shape[0]]
