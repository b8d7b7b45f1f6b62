"""8-bit block quantisation (Dettmers 2016), with stochastic rounding."""

from __future__ import annotations

from keras import ops

from hvdlm.protocols.types import Tensor
from hvdlm_compression.qsgd import QSGD


class Int8(QSGD):
    """Quantises to 8 bits an element, scaled by the block's largest magnitude."""

    default_block = 256

    def bits(self) -> int:
        """Return the bits of an element, its sign included."""
        return 8

    def scale(self, rows: Tensor) -> Tensor:
        """Return the largest magnitude of every block."""
        return ops.max(ops.abs(rows), axis=1, keepdims=True)
