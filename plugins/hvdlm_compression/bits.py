"""Packs small integers into bytes, and unpacks them."""

from __future__ import annotations

import numpy as np
from keras import ops

from hvdlm.protocols.types import Tensor


def pack(values: Tensor, bits: int) -> Tensor:
    """Return uint8 ``[..., n * bits / 8]`` from float32 ``[..., n]`` that holds integers from 0 to 2 ** bits - 1.

    A byte holds the values with the indices i, i + m, i + 2 m and so on, m = n * bits / 8: both directions then work on
    runs of m elements, which the frameworks compute several at a time.
    """
    per_byte = 8 // bits
    runs = ops.reshape(values, (*values.shape[:-1], per_byte, values.shape[-1] // per_byte))
    total = runs[..., 0, :]
    for number in range(1, per_byte):
        total = total + runs[..., number, :] * 2.0 ** (bits * number)
    return ops.cast(total, "uint8")


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Return the integers that ``pack`` packed, as float32 ``[..., n]``."""
    per_byte = 8 // bits
    shifts = ops.convert_to_tensor((bits * np.arange(per_byte)).astype(np.uint8).reshape(-1, 1))
    highest = ops.convert_to_tensor(np.uint8(2**bits - 1))
    numbers = ops.bitwise_and(ops.right_shift(ops.expand_dims(packed, -2), shifts), highest)
    return ops.cast(ops.reshape(numbers, (*packed.shape[:-1], packed.shape[-1] * per_byte)), "float32")
