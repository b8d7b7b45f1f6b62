"""Gradients in bf16: half of the bytes of fp32, summed by the all-reduce in bf16."""

from __future__ import annotations

from hvdlm_compression.half_precision import HalfPrecision


class BFloat16(HalfPrecision):
    """Rounds to bf16, which has the range of fp32: no sum overflows that wouldn't overflow in fp32.

    The all-reduce of n ranks rounds partial sums up to n - 1 times more, by at most a relative 2^-9 each.
    """

    dtype = "bfloat16"
