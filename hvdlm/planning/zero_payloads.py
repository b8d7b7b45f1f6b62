"""What ZeRO's ranks hand over where gradients are compressed, or parameters rounded: see ``hvdlm_compression.zero``."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from hvdlm.config import CompressionConfig, Config
from hvdlm.parallel.flat_layout import FlatLayout, Slot
from hvdlm.planning.payloads import MIN_ELEMENTS, block_of, is_compressible, payload

KNOWN = ("fp16", "bf16", "int8", "int4", "qsgd", "scaled_sign", "sign_majority", "top_k", "random_k")
"""Built-in compressors whose payloads can be sent by shards."""

GATHERED_BLOCK = 256
"""Elements of gathered parameters that share a scale of int8, unless ``communication.compression.block`` is set."""


class ZeroPayload(NamedTuple):
    """What ranks hand over of one bucket.

    Attributes:
        gradients: bytes of all shards that every rank sends, in every exchange of them.
        rest: bytes of the gradients that it doesn't compress, in every exchange.
        parameters: bytes of every rank's own shard.
        compressed: elements of all shards that are compressed, with the zeros that make shards equal.
    """

    gradients: int
    rest: int
    parameters: list[int]
    compressed: int


def gathered_as(config: Config) -> str:
    """Return the dtype in which ZeRO gathers parameters: ``parallel.zero_gather``, else as gradients are sent."""
    algorithm = config.communication.compression.algorithm
    derived = {"none": "fp32", "fp16": "bf16", "bf16": "bf16"}.get(algorithm, "int8")
    return config.parallel.zero_gather or derived


def is_rounded(slot: Slot, settings: CompressionConfig) -> bool:
    """Return whether a parameter is rounded: matrices are; vectors are few, and share no scale with them."""
    smallest = MIN_ELEMENTS if settings.min_elements is None else settings.min_elements
    return len(slot.shape) > 1 and slot.stop - slot.start >= smallest


def zero_payloads(config: Config, layout: FlatLayout, ranks: int) -> list[ZeroPayload]:
    """Return what ``ranks`` ranks hand over of every bucket; of a compressor not in ``KNOWN``, as if it were dense."""
    compresses, rounds = config.communication.compression.algorithm in KNOWN, gathered_as(config) != "fp32"
    payloads = []
    for index in range(len(layout.buckets)):
        start, stop = layout.bucket_range(index)
        gradients, rest, parameters, compressed = 4 * (stop - start), 0, [4 * (stop - start) // ranks] * ranks, 0
        if compresses:
            gradients, rest, compressed = _scattered(config, layout, index, ranks)
        if rounds:
            parameters = _gathered(config, layout, index, ranks)
        payloads.append(ZeroPayload(gradients, rest, parameters, compressed))
    return payloads


def _scattered(config: Config, layout: FlatLayout, index: int, ranks: int) -> tuple[int, int, int]:
    """Return the bytes of all shards of a bucket and of the rest, and the elements that are compressed."""
    settings = config.communication.compression
    sizes = {slot.stop - slot.start for slot in layout.slots}
    chosen = {size for size in sizes if is_compressible(settings, (size,), ranks)}
    width, rest = _counts(layout, index, ranks, lambda slot: slot.stop - slot.start in chosen)
    start, stop = layout.bucket_range(index)
    if not width:
        return 4 * (stop - start), 0, 0
    width = _multiple(width, block_of(settings))
    of_shard = _multiple(round(payload(settings, (width,), ranks).bytes), 4)
    return ranks * of_shard, 4 * sum(rest), ranks * width


def _gathered(config: Config, layout: FlatLayout, index: int, ranks: int) -> list[int]:
    """Return the bytes of every rank's shard of rounded parameters."""
    settings = config.communication.compression
    width, rest = _counts(layout, index, ranks, lambda slot: is_rounded(slot, settings))
    start, stop = layout.bucket_range(index)
    if not width:
        return [4 * (stop - start) // ranks] * ranks
    if gathered_as(config) == "bf16":
        row = _multiple(2 * width, 4)
    else:
        block = settings.block or GATHERED_BLOCK
        width = _multiple(width, block)
        row = width + 4 * (width // block)
    return [row + 4 * count for count in rest]


def _counts(layout: FlatLayout, index: int, ranks: int, chosen: Callable[[Slot], bool]) -> tuple[int, list[int]]:
    """Return the most elements of chosen slots in any rank's shard of a bucket, and those of others in each."""
    begin, end = layout.bucket_range(index)
    first, last = layout.buckets[index]
    length = (end - begin) // ranks
    counts = {True: [0] * ranks, False: [0] * ranks}
    for slot in layout.slots[first:last]:
        low, high, of_kind = slot.start - begin, slot.stop - begin, counts[chosen(slot)]
        for rank in range(low // length, -(-high // length)):
            of_kind[rank] += min(high, (rank + 1) * length) - max(low, rank * length)
    return max(counts[True]), counts[False]


def _multiple(count: int, of: int) -> int:
    return -(-count // of) * of
