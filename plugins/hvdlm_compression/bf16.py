"""Gradients in bf16: half of the bytes of fp32, summed by the all-reduce in bf16."""

from __future__ import annotations

from collections.abc import Sequence

from keras import ops

from hvdlm.protocols.types import Tensor
from hvdlm_compression.compressor import Compressor


class BFloat16(Compressor):
    """Rounds to bf16, which has the range of fp32: no sum overflows that wouldn't overflow in fp32.

    The all-reduce of n ranks rounds partial sums up to n - 1 times more, by at most a relative 2^-9 each.
    """

    collective = "all_reduce"
    biased = False

    def granule(self) -> int | None:
        """Return 1: every element is rounded by itself."""
        return 1

    def compress(self, tensor: Tensor, step: Tensor) -> Sequence[Tensor]:
        """Return [bfloat16 ``[n]``]."""
        return [ops.cast(tensor, "bfloat16")]

    def decompress(self, payload: Sequence[Tensor], shape: tuple[int, ...], step: Tensor) -> Tensor:
        """Return the float32 sum."""
        return ops.cast(payload[0], "float32")
