"""Gradients as bf16, which Horovod cannot sum: they travel as 16-bit words and are summed by the ranks."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

from keras import ops

from hvdlm.protocols.compressor import Reduced, Request
from hvdlm.protocols.types import Tensor
from hvdlm_compression.base import Compressor


class BFloat16(Compressor):
    """Gradients as bf16: fp32's range, half its bytes on the wire.

    The two halves of a ring all-reduce: an all-to-all hands each rank its part of everyone's vector, which it sums in
    fp32; an all-gather hands the sums back.
    """

    biased = False

    def payload_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of both halves."""
        part = -(-shape[0] // self.ranks)
        return 2 * part * (self.ranks + 1)

    def reduce(
        self, tensor: Tensor, memory: Mapping[str, Any], step: Tensor
    ) -> Generator[Request, list[Tensor], Reduced]:
        """Sum in two rounds; see ``interfaces.Compressor``."""
        count = tensor.shape[0]
        rounded = ops.cast(ops.pad(tensor, [[0, -count % self.ranks]]), "bfloat16")
        parts = yield Request("all_to_all", [ops.view(rounded, "int16")])
        part = ops.sum(_floats(parts[0]), axis=0)
        sums = yield Request("all_gather", [ops.view(ops.cast(part, "bfloat16"), "int16")])
        total = ops.reshape(_floats(sums[0]), (-1,))[:count]
        return total, lambda: ops.cast(rounded, "float32")[:count]


def _floats(words: Tensor) -> Tensor:
    return ops.cast(ops.view(words, "bfloat16"), "float32")
