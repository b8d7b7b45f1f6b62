"""Scaled sign: one bit an element (Karimireddy et al. 2019, "Error feedback fixes SignSGD")."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from keras import ops

from hvdlm.protocols.types import Tensor
from hvdlm_compression.bits import pack, unpack
from hvdlm_compression.compressor import Compressor, blocks


class ScaledSign(Compressor):
    """C(x) = (||x||_1 / n) sign(x) (algorithm 1) for each block; the sign of zero is positive."""

    def granule(self) -> int | None:
        """Return the block: each is compressed by itself."""
        return self.block

    def compress(self, tensor: Tensor, step: Tensor) -> Sequence[Tensor]:
        """Return [scales float32 ``[blocks]``, signs uint8 ``[blocks, block / 8]``]."""
        width = self.block
        rows = blocks(tensor, width)
        counts = np.full(rows.shape[0], width, np.float32)
        counts[-1] = tensor.shape[0] - width * (rows.shape[0] - 1)
        scales = ops.sum(ops.abs(rows), axis=1) / ops.convert_to_tensor(counts)
        return [scales, pack(ops.cast(rows >= 0.0, "float32"), 1)]

    def decompress(self, payload: Sequence[Tensor], shape: tuple[int, ...], step: Tensor) -> Tensor:
        """Return float32 ``[n]``."""
        scales, packed = payload
        return ops.reshape(signs(packed) * ops.expand_dims(scales, -1), (-1,))[: shape[0]]


def signs(packed: Tensor) -> Tensor:
    """Return the signs, -1 or 1, of packed bits: float32 ``[..., n]``."""
    return 2.0 * unpack(packed, 1) - 1.0
