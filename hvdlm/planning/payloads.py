"""What built-in compressors send, in closed form."""

from __future__ import annotations

import math
from typing import NamedTuple

from hvdlm.config import CompressionConfig

HALF_PRECISION = ("fp16", "bf16")
"""Compressors that round every element by itself."""

UNBIASED = ("none", "fp16", "bf16", "qsgd", "int8")
"""Compressors without error feedback, unless ``communication.compression.error_feedback`` is set."""

_BLOCKS = {"int8": 256, "scaled_sign": 256, "sign_majority": 256, "int4": 128, "qsgd": 64, "chunked_top_k": 4096}


MIN_ELEMENTS = 1024
"""The default of ``communication.compression.min_elements``, but for fp16 and bf16."""


class Payload(NamedTuple):
    """What a compressor sends of a tensor; ``bytes``: of one rank. ``received``: payloads that are decompressed."""

    operation: str
    bytes: float
    received: float = 1.0


def payload(settings: CompressionConfig, shape: tuple[int, ...], ranks: int) -> Payload:
    """Return what a built-in compressor sends of a vector ``[n]``, or power_sgd of a matrix, in a step."""
    count, name, block = math.prod(shape), settings.algorithm, block_of(settings)
    if name in HALF_PRECISION:
        return Payload("all_reduce", 2.0 * count)
    if name == "power_sgd":
        return Payload("all_reduce", 4.0 * settings.rank * sum(shape))
    if name == "random_k":
        return Payload("all_reduce", 4.0 * max(1, round(count * (settings.ratio or 0.1))))
    if name in ("top_k", "dgc"):
        return Payload("all_gather", 8.0 * max(1, round(count * (settings.ratio or 0.01))))
    if name == "chunked_top_k":
        sent = min(block, max(4, 4 * round(block * (settings.ratio or 1 / 64) / 4)))
        return Payload("all_gather", -(-count // block) * (8.0 + 1.75 * sent), float(ranks))
    bits = {"int8": 8, "int4": 4, "qsgd": settings.bits, "scaled_sign": 1, "sign_majority": 1}.get(name, 32)
    return Payload("all_gather", -(-count // block) * (4.0 + block * bits / 8), float(ranks))


def block_of(settings: CompressionConfig) -> int:
    """Return the elements that share a scale; 1 where there are no blocks."""
    default = _BLOCKS.get(settings.algorithm)
    return 1 if default is None else settings.block or default


def smallest_compressed(settings: CompressionConfig) -> int:
    """Return the elements from which on a tensor is compressed: in half precision all are, and a bucket is one sum."""
    default = 1 if settings.algorithm in HALF_PRECISION else MIN_ELEMENTS
    return default if settings.min_elements is None else settings.min_elements


def is_compressible(settings: CompressionConfig, shape: tuple[int, ...], ranks: int) -> bool:
    """Return whether a tensor, of this shape as it is compressed, is large enough and its payload small enough."""
    count = math.prod(shape)
    if count < smallest_compressed(settings) or (settings.algorithm == "power_sgd" and len(shape) < 2):
        return False
    return 4 * count >= settings.min_compression * payload(settings, shape, ranks).bytes
