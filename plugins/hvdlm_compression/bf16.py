"""Gradients in bf16, which Horovod cannot sum: they are sent as 16-bit integers and summed by the ranks."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

from keras import ops

from hvdlm.protocols.compressor import Reduced, Request
from hvdlm.protocols.types import Tensor
from hvdlm_compression.compressor import Compressor


class BFloat16(Compressor):
    """Rounds to bf16: the range of fp32, half of its bytes on the wire.

    Reduce-scatter and all-gather in steps: an all-to-all gives each rank its shard of every rank's vector, the rank
    sums these in fp32, and an all-gather returns the sums.
    """

    biased = False

    def payload_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of both collectives."""
        shard = -(-shape[0] // self.ranks)
        return 2 * shard * (self.ranks + 1)

    def reduce(
        self, tensor: Tensor, memory: Mapping[str, Any], step: Tensor
    ) -> Generator[Request, list[Tensor], Reduced]:
        """Sum in two rounds."""
        count = tensor.shape[0]
        rounded = ops.cast(ops.pad(tensor, [[0, -count % self.ranks]]), "bfloat16")
        shards = yield Request("all_to_all", [ops.view(rounded, "int16")])
        summed = ops.sum(_floats(shards[0]), axis=0)
        sums = yield Request("all_gather", [ops.view(ops.cast(summed, "bfloat16"), "int16")])
        total = ops.reshape(_floats(sums[0]), (-1,))[:count]
        return total, lambda: ops.cast(rounded, "float32")[:count]


def _floats(words: Tensor) -> Tensor:
    return ops.cast(ops.view(words, "bfloat16"), "float32")
