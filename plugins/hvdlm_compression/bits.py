"""Small whole numbers packed into bytes."""

from __future__ import annotations

import numpy as np
from keras import ops

from hvdlm.protocols.types import Tensor


def pack(values: Tensor, bits: int) -> Tensor:
    """Return uint8 ``[..., n * bits / 8]`` from whole float32 ``[..., n]`` in 0 to 2 ** bits - 1."""
    each = 8 // bits
    powers = ops.convert_to_tensor((2.0 ** (bits * np.arange(each))).astype(np.float32))
    grouped = ops.reshape(values, (*values.shape[:-1], values.shape[-1] // each, each))
    return ops.cast(ops.matmul(grouped, powers), "uint8")


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Return float32 ``[..., n]`` from what ``pack`` made."""
    each = 8 // bits
    table = (np.arange(256)[:, None] >> (bits * np.arange(each))) & (2**bits - 1)
    numbers = ops.take(ops.convert_to_tensor(table.astype(np.float32)), ops.cast(packed, "int32"), axis=0)
    return ops.reshape(numbers, (*packed.shape[:-1], packed.shape[-1] * each))
