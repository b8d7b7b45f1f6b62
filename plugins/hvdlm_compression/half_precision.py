"""Compressors that round every element to 16 bits, which the all-reduce sums."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

from keras import ops

from hvdlm.protocols.compressor import Reduced, Request
from hvdlm.protocols.types import Tensor
from hvdlm_compression.compressor import Compressor


class HalfPrecision(Compressor):
    """Rounds to ``dtype``: half of the bytes of fp32."""

    collective = "all_reduce"
    biased = False
    scatters = True
    dtype: str

    def granule(self) -> int | None:
        """Return 1: every element is rounded by itself."""
        return 1

    def compress(self, tensor: Tensor, step: Tensor) -> Sequence[Tensor]:
        """Return [``[n]`` of ``dtype``]."""
        return [ops.cast(tensor, self.dtype)]

    def decompress(self, payload: Sequence[Tensor], shape: tuple[int, ...], step: Tensor) -> Tensor:
        """Return the float32 sum."""
        return ops.cast(payload[0], "float32")

    def reduce(
        self, tensor: Tensor, memory: Mapping[str, Any], step: Tensor
    ) -> Generator[Request, list[Tensor], Reduced]:
        """Sum the rounded tensor, in its own memory; the sum is converted where it is stored.

        The contribution, which few ask for (error feedback), is rounded anew.
        """
        (total,) = yield Request("all_reduce", self.call(self.compress, tensor, step), overwrites=True)
        return total, lambda: ops.cast(ops.cast(tensor, self.dtype), "float32")
