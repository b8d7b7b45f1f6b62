"""ZeRO with compressed gradients and rounded parameters (ZeRO++, Wang et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from keras import ops

from hvdlm.config import CommunicationConfig, Config
from hvdlm.parallel.flat_layout import FlatLayout, Slot
from hvdlm.parallel.zero import ZeroExchange
from hvdlm.planning.zero_payloads import gathered_as, is_rounded
from hvdlm.protocols.group import Converted, Group, Handle
from hvdlm.protocols.types import Tensor
from hvdlm_compression.compressor import Compressor
from hvdlm_compression.exchange import CompressedExchange
from hvdlm_compression.packing import Packing
from hvdlm_compression.rounding import make_rounding
from hvdlm_compression.shard_rows import ShardRows


class CompressedZeroExchange(ZeroExchange):
    """Scatters compressed gradients (qgZ, section 3.3), and gathers rounded parameters (qwZ, section 3.1).

    A rank updates its shard of the float32 parameters. All ranks, the shard's owner too, compute with what they have
    gathered of it, so that they have the same parameters.
    """

    def __init__(self, group: Group, compressor: Compressor | None, config: Config, index: int) -> None:
        options = config.communication
        super().__init__(group, options, index, config.parallel.zero)
        self._rank = index
        self._options = options.compression
        self._sums = ScatteredSums(group, compressor, options, index) if compressor else None
        self._rounding = make_rounding(gathered_as(config), options.compression.block)
        self._rows: list[ShardRows] = []
        replicated = self._sums.traits.replicated if self._sums else ()
        self.traits = replace(self.traits, rounds_parameters=self._rounding is not None, replicated=replicated)

    def open(self, layout: FlatLayout, parameters: np.ndarray) -> None:
        """Decide what is compressed and rounded; reset the error feedback."""
        super().open(layout, parameters)
        if self._sums:
            self._sums.open(layout, parameters)
        if self._rounding and not self._rows:
            rounded, multiple = partial(is_rounded, settings=self._options), self._rounding.multiple
            self._rows = [ShardRows(layout, i, self.size, rounded, multiple) for i in self._buckets]

    def begin(self, step: int) -> Hashable:
        """Begin a step; return the compressor's phase."""
        return self._sums.begin(step) if self._sums else None

    def start(self, bucket: Tensor, index: int) -> Handle:
        """Start to sum the bucket; the handle's result is this rank's shard of the sum, ``[elements / ranks]``."""
        return self._sums.start(bucket, index) if self._sums else super().start(bucket, index)

    def gather(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """Return every bucket's rounded parameters from this rank's updated shards of the float32 ones."""
        if not self._rounding:
            return super().gather(shards)
        started = [self._gathered(shards[i], i) for i in self._buckets]
        return [handle.wait() for handle in started]

    def _gathered(self, shard: Tensor, index: int) -> Handle:
        """Start to gather a bucket."""
        assert self._rounding is not None
        decode, rows, name = self._rounding.decode, self._rows[index], f"parameters.{index}"
        if not rows.width:
            return self._group.all_gather_async(shard, name)
        row, rest = rows.split_shard(shard, self._rank)
        encoded = self._rounding.encode(row)
        packing = Packing(encoded)
        own = [ops.reshape(packing.pack(encoded), (-1,)), *([ops.view(rest, "uint8")] if rows.rest[self._rank] else [])]

        def unpacked(gathered: Tensor) -> Tensor:
            # TensorFlow doesn't know the length of what ranks with different numbers of elements gather.
            gathered = ops.reshape(gathered, (self.size * packing.bytes + 4 * sum(rows.rest),))
            packed, others, start = [], [], 0
            for count in rows.rest:  # every rank's row, and what it has of the rest
                middle = start + packing.bytes
                packed.append(gathered[start:middle])
                others.append(gathered[middle : middle + 4 * count])
                start = middle + 4 * count
            sent = packing.unpack(ops.reshape(ops.concatenate(packed), (self.size, packing.bytes)))
            unrounded = ops.view(ops.concatenate(others), "float32") if any(rows.rest) else None
            return rows.bucket(decode(sent), unrounded)

        sent = ops.concatenate(own) if len(own) > 1 else own[0]
        return Converted(self._group.all_gather_async(sent, name), unpacked)

    def keep_copies(self) -> None:
        """Copy the error feedback where a step begins."""
        if self._sums:
            self._sums.keep_copies()

    def settle(self, applied: Tensor) -> None:
        """Restore the error feedback unless the step is ``applied``."""
        if self._sums:
            self._sums.settle(applied)

    def state(self) -> dict[str, np.ndarray]:
        """Return the error feedback."""
        return self._sums.state() if self._sums else {}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore the error feedback; what is missing starts at zero."""
        if self._sums:
            self._sums.load_state(state)


class ScatteredSums(CompressedExchange):
    """Sums compressed gradients by shards: a rank sends each rank the payload of that rank's shard, and adds its own.

    Error feedback is the sender's, of each destination's shard, as in ``CompressedExchange``. It sums no matrices:
    ``compressor`` has ``scatters``.
    """

    def __init__(self, group: Group, compressor: Compressor, options: CommunicationConfig, index: int) -> None:
        super().__init__(group, compressor, options)
        self._rank = index
        self._shards: Any = compressor
        self._rows: list[ShardRows] = []

    def open(self, layout: FlatLayout, parameters: np.ndarray) -> None:
        """Decide which slots are compressed, and reset all errors."""
        super().open(layout, parameters)
        if self._rows:
            return
        for index, bucket in enumerate(self._buckets):
            chosen = {slot.name for unit in bucket.units for slot in unit.slots}
            self._rows.append(self._rows_of(layout, index, chosen))

    def _rows_of(self, layout: FlatLayout, index: int, chosen: set[str]) -> ShardRows:
        def is_chosen(slot: Slot) -> bool:
            return slot.name in chosen

        return ShardRows(layout, index, self.size, is_chosen, self._shards.granule() or 1)

    def start(self, bucket: Tensor, index: int) -> Handle:
        """Start to sum the bucket; the handle's result is this rank's shard of the sum, ``[elements / ranks]``."""
        bucket, name, rows = self.predivided(bucket), f"gradients.{index}", self._rows[index]
        if self._dense or not rows.width:
            return self.scaled(self._group.reduce_scatter_async(bucket, name))
        # A copy: in PyTorch the tensor is the Variable's own, and a sum may be finished in a later step.
        step = ops.copy(ops.convert_to_tensor(self._step))
        (unit,) = self._buckets[index].units
        vector, rest = rows.split(bucket)
        if unit.error is not None:
            vector = vector + ops.convert_to_tensor(unit.error)
        payload = self._payload(rows.rows(vector), step)
        packing = Packing(payload)
        handle = self._group.all_to_all_async(ops.reshape(packing.pack(payload), (-1,)), name)
        # A copy: Horovod sums in place in PyTorch, and the gradients are the framework's.
        summed = self._group.all_reduce_async(ops.copy(rest), f"{name}.rest") if any(rows.rest) else None
        if unit.error is not None:
            unit.error.assign(vector - rows.vector(self._decompressed(payload, rows.width, step)))

        def added(received: Tensor) -> Tensor:
            tensors = packing.unpack(ops.reshape(received, (self.size, packing.bytes)))
            total = self._total(tensors, rows.width, step)
            return rows.shard(total, summed.wait() if summed else None, self._rank)

        return self.scaled(Converted(handle, added))

    def _payload(self, rows: Tensor, step: Tensor) -> list[Tensor]:
        """Return the payloads of ``[ranks, width]``, one for each rank: tensors ``[ranks, ...]``."""
        if self._shards.granule():
            payload = self._shards.compress(ops.reshape(rows, (-1,)), step)
            return [ops.reshape(one, (self.size, one.shape[0] // self.size, *one.shape[1:])) for one in payload]
        payloads = [self._shards.compress(rows[rank], step) for rank in range(self.size)]
        return [ops.stack(of_ranks) for of_ranks in zip(*payloads, strict=True)]

    def _decompressed(self, payload: Sequence[Tensor], width: int, step: Tensor) -> Tensor:
        """Return ``[ranks, width]`` from payloads ``[ranks, ...]``."""
        if self._shards.granule():
            joined = [ops.reshape(one, (math.prod(one.shape[:2]), *one.shape[2:])) for one in payload]
            return ops.reshape(self._shards.decompress(joined, (self.size * width,), step), (self.size, width))
        each = [[one[rank] for one in payload] for rank in range(self.size)]
        return ops.stack([self._shards.decompress(one, (width,), step) for one in each])

    def _total(self, payload: Sequence[Tensor], width: int, step: Tensor) -> Tensor:
        """Return the sum ``[width]`` of what all ranks sent to this one, payloads ``[ranks, ...]``."""
        if type(self._shards).add_up is Compressor.add_up:
            return _sum(self._decompressed(payload, width, step))
        return self._shards.add_up(payload, (width,), step)


def _sum(rows: Tensor) -> Tensor:
    """Return the sum of ``[ranks, n]`` over the ranks, in their order in every framework."""
    total = rows[0]
    for rank in range(1, rows.shape[0]):
        total = total + rows[rank]
    return total
