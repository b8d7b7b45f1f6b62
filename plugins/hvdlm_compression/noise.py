"""Random numbers that are equal in both frameworks: functions of seed, step and index, without generator state."""

from __future__ import annotations

import numpy as np
from keras import ops

from hvdlm.protocols.types import Tensor


def uniform(count: int, step: Tensor, seed: int) -> Tensor:
    """Return float32 ``[count]`` in [0, 1): a hash (Wang 2007's 32-bit mix) of position, ``step`` and ``seed``."""
    start = (np.arange(count, dtype=np.int64) * 0x9E3779B1 + seed * 0x85EBCA6B) & 0xFFFFFFFF
    bits = ops.convert_to_tensor(start.astype(np.uint32).view(np.int32)) + step * _word(0xC2B2AE35)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        bits = ops.bitwise_xor(bits, _shifted(bits, shift)) * _word(factor)
    return ops.cast(_shifted(bits, 8), "float32") * np.float32(2.0**-24)


def dither(rows: int, width: int, step: Tensor, seed: int) -> Tensor:
    """Return float32 ``[rows, width]`` in [0, 1), each number uniform over steps and seeds.

    A row is the step's random vector plus the row's own constant, modulo 1: a hash for every element would take longer
    than a small model's step.
    """
    offsets = np.random.Generator(np.random.Philox(key=seed)).random((rows, 1), np.float32)
    shifted = uniform(width, step, seed) + ops.convert_to_tensor(offsets)
    return shifted - ops.floor(shifted)


def _word(value: int) -> Tensor:
    return ops.convert_to_tensor(np.uint32(value).view(np.int32))


def _shifted(bits: Tensor, count: int) -> Tensor:
    """Return a logical shift to the right: on signed integers ``right_shift`` copies the sign bit."""
    return ops.bitwise_and(ops.right_shift(bits, count), _word(0xFFFFFFFF >> count))
