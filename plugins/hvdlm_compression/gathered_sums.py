"""Sums of compressed buckets by one all-gather each, which may stay in flight over several steps."""

from __future__ import annotations

from typing import Any

from keras import ops

from hvdlm.config import CommunicationConfig
from hvdlm.protocols.group import Group, Handle
from hvdlm.protocols.types import Tensor
from hvdlm_compression.compressor import Compressor
from hvdlm_compression.exchange import CompressedExchange, assembled
from hvdlm_compression.packing import Packing


def gathers(compressor: Any) -> bool:
    """Return whether the payload of a vector is gathered in one round."""
    return getattr(compressor, "scatters", False) and compressor.collective == "all_gather"


class GatheredSums(CompressedExchange):
    """As ``CompressedExchange``, for a compressor that ``gathers``; dense slots travel with the payload.

    ``encode`` and ``decode`` are all that a rank computes before and after the all-gather: a caller outside of a
    step's graph may call each as a graph.
    """

    def __init__(self, group: Group, compressor: Compressor, options: CommunicationConfig) -> None:
        super().__init__(group, compressor, options)
        self._payloads: Compressor = compressor
        self._packings: dict[int, Packing] = {}

    def encodes(self, index: int) -> bool:
        """Return whether this bucket is compressed in this step; if not, ``start`` sums it."""
        return not self._dense and bool(self._buckets[index].units)

    def encode(self, bucket: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Return this rank's row, uint8 ``[bytes]``, and the step, for ``decode``; update the error feedback."""
        plan, bucket = self._buckets[index], self.predivided(bucket)
        (unit,) = plan.units
        # A copy: in PyTorch the tensor is the Variable's own, and a sum may be finished in a later step.
        step = ops.copy(ops.convert_to_tensor(self._step))
        vector = self._gather(bucket, plan, unit.slots)
        if unit.error is not None:
            vector = vector + ops.convert_to_tensor(unit.error)
        sent = list(self._payloads.compress(vector, step))
        if unit.error is not None:
            unit.error.assign(vector - self._payloads.decompress(sent, unit.shape, step))
        if plan.dense:
            sent.append(self._gather(bucket, plan, plan.dense))
        rows = [ops.expand_dims(tensor, 0) for tensor in sent]
        packing = self._packings[index] = Packing(rows)
        return ops.reshape(packing.pack(rows), (-1,)), step

    def decode(self, gathered: Tensor, step: Tensor, index: int) -> Tensor:
        """Return the flat sum of all ranks' rows ``[ranks * bytes]``.

        Nothing in it depends on the rank: TensorFlow may change the order of a graph's additions, alike on all ranks.
        """
        plan, packing = self._buckets[index], self._packings[index]
        (unit,) = plan.units
        received = packing.unpack(ops.reshape(gathered, (self.size, packing.bytes)))
        dense = [received.pop()] if plan.dense else []
        totals = [self._payloads.add_up(received, unit.shape, step)]
        for rows in dense:
            of_all = rows[0]
            for rank in range(1, self.size):
                of_all = of_all + rows[rank]
            totals.append(of_all)
        flat = assembled(plan, totals)
        return flat if self._after == 1.0 else flat * self._after

    def send(self, row: Tensor, step: Tensor, index: int) -> GatheredSum:
        """Start to gather what ``encode`` returned."""
        return GatheredSum(self._group.all_gather_async(row, f"gradients.{index}"), step)


class GatheredSum:
    """A bucket in flight, for ``decode``. ``step``: the one that started it; ``wait`` returns all ranks' rows."""

    def __init__(self, handle: Handle, step: Tensor) -> None:
        self.step = step
        self.wait = handle.wait
