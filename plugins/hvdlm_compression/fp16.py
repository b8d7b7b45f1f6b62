"""Gradients in fp16: half of the bytes of fp32, summed by the all-reduce in fp16."""

from __future__ import annotations

from hvdlm_compression.half_precision import HalfPrecision


class Float16(HalfPrecision):
    """Rounds to fp16; ``communication.predivide`` keeps sums below 65504, above which they become infinite."""

    dtype = "float16"
