"""Gradients in fp16: half of the bytes of fp32, summed by the all-reduce in fp16."""

from __future__ import annotations

from collections.abc import Sequence

from keras import ops

from hvdlm.protocols.types import Tensor
from hvdlm_compression.compressor import Compressor


class Float16(Compressor):
    """Rounds to fp16; ``communication.predivide`` keeps sums below 65504, above which they become infinite."""

    collective = "all_reduce"
    biased = False

    def granule(self) -> int | None:
        """Return 1: every element is rounded by itself."""
        return 1

    def compress(self, tensor: Tensor, step: Tensor) -> Sequence[Tensor]:
        """Return [float16 ``[n]``]."""
        return [ops.cast(tensor, "float16")]

    def decompress(self, payload: Sequence[Tensor], shape: tuple[int, ...], step: Tensor) -> Tensor:
        """Return the float32 sum."""
        return ops.cast(payload[0], "float32")
