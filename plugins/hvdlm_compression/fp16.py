"""Gradients as fp16: half of fp32's bytes, summed by Horovod as they are."""

from __future__ import annotations

from collections.abc import Sequence

from keras import ops

from hvdlm.protocols.types import Tensor
from hvdlm_compression.base import Compressor


class Float16(Compressor):
    """Rounds to fp16; values above 65504 would become infinite: ``communication.predivide`` keeps sums below."""

    collective = "all_reduce"
    biased = False

    def compress(self, tensor: Tensor, step: Tensor) -> Sequence[Tensor]:
        """Return [float16 ``[n]``]."""
        return [ops.cast(tensor, "float16")]

    def decompress(self, payload: Sequence[Tensor], shape: tuple[int, ...], step: Tensor) -> Tensor:
        """Return the float32 sum."""
        return ops.cast(payload[0], "float32")
