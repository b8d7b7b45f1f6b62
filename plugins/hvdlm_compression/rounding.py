"""How updated parameters are rounded where ZeRO's ranks gather them (qwZ of ZeRO++, Wang et al. 2023, section 3.1).

To the nearest value: what the ranks compute with follows from the float32 parameters alone, so that a resumed run
computes with the same values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from keras import ops

from hvdlm.planning.zero_payloads import GATHERED_BLOCK
from hvdlm.protocols.types import Tensor

_LEVELS = 127  # on each side of zero
_SMALLEST = 1e-30  # scale of a block that is sent; that of a smaller one, 127 divided by it, might be infinite


class Rounding(Protocol):
    """Rounds rows of parameters.

    Attributes:
        multiple: rows have a multiple of so many elements.
    """

    multiple: int

    def encode(self, rows: Tensor) -> list[Tensor]:
        """Return what is sent of float32 ``[rows, width]``: tensors ``[rows, ...]``."""

    def decode(self, sent: Sequence[Tensor]) -> Tensor:
        """Return float32 ``[rows, width]``."""


class HalfPrecision:
    """Rounds to bfloat16, which has the range of float32."""

    multiple = 1

    def encode(self, rows: Tensor) -> list[Tensor]:
        """Return [bfloat16 ``[rows, width]``]."""
        return [ops.cast(rows, "bfloat16")]

    def decode(self, sent: Sequence[Tensor]) -> Tensor:
        """Return float32 ``[rows, width]``."""
        return ops.cast(sent[0], "float32")


class EightBits:
    """Rounds to one of 255 levels of a block's largest magnitude: by at most a 254th of it."""

    def __init__(self, block: int | None) -> None:
        self.multiple = block or GATHERED_BLOCK

    def encode(self, rows: Tensor) -> list[Tensor]:
        """Return [scales float32 ``[rows, blocks]``, levels int8 ``[rows, width]``]."""
        blocks = ops.reshape(rows, (rows.shape[0], -1, self.multiple))
        scales = ops.max(ops.abs(blocks), axis=2)
        inverse = ops.where(scales > _SMALLEST, _LEVELS / ops.maximum(scales, _SMALLEST), 0.0)
        levels = ops.floor(blocks * ops.expand_dims(inverse, -1) + 0.5)
        return [scales, ops.cast(ops.reshape(levels, rows.shape), "int8")]

    def decode(self, sent: Sequence[Tensor]) -> Tensor:
        """Return float32 ``[rows, width]``."""
        scales, levels = sent
        blocks = ops.reshape(ops.cast(levels, "float32"), (*scales.shape, self.multiple))
        return ops.reshape(blocks * ops.expand_dims(scales * (1.0 / _LEVELS), -1), levels.shape)


def make_rounding(name: str, block: int | None) -> Rounding | None:
    """Return the rounding of ``parallel.zero_gather``; None for fp32."""
    if name == "bf16":
        return HalfPrecision()
    return EightBits(block) if name == "int8" else None
