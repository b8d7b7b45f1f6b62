"""4-bit block quantisation for outer differences (Douillard et al. 2025, section 2.3, sends 4 bits of each, too)."""

from __future__ import annotations

from collections.abc import Sequence

from keras import ops

from hvdlm.protocols.types import Tensor
from hvdlm_compression.bits import pack, unpack
from hvdlm_compression.compressor import Compressor, blocks

_LEVELS = 7  # on each side of zero
_LEAST = 1e-37


class Int4(Compressor):
    """Rounds to the nearest of 15 levels, scaled by the block's largest magnitude, which is sent exactly.

    Every other element's error is at most a 14th of that: ||x - C(x)||^2 <= (block - 1) / 196 ||x||^2. With blocks of
    up to 128 this is a contraction whatever the tensor is, as error feedback needs it.
    """

    default_block = 128

    def granule(self) -> int | None:
        """Return the block: each is compressed by itself."""
        return self.block

    def compress(self, tensor: Tensor, step: Tensor) -> Sequence[Tensor]:
        """Return [scales float32 ``[blocks]``, levels uint8 ``[blocks, block / 2]``]."""
        rows = blocks(tensor, self.block)
        scales = ops.max(ops.abs(rows), axis=1, keepdims=True)
        # Below the least scale a block is sent as zeros: a larger inverse could be infinite. All levels are in range.
        inverse = ops.where(scales > _LEAST, _LEVELS / ops.maximum(scales, _LEAST), 0.0)
        return [ops.reshape(scales, (-1,)), pack(ops.floor(rows * inverse + (_LEVELS + 0.5)), 4)]

    def decompress(self, payload: Sequence[Tensor], shape: tuple[int, ...], step: Tensor) -> Tensor:
        """Return float32 ``[n]``."""
        scales, packed = payload
        steps = unpack(packed, 4) - _LEVELS
        return ops.reshape(steps * ops.expand_dims(scales * (1.0 / _LEVELS), -1), (-1,))[: shape[0]]
