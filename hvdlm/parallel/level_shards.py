"""The layout of the shards that sums in two levels exchange between nodes."""

from __future__ import annotations

from dataclasses import replace

from hvdlm.parallel.flat_layout import FlatLayout, Slot, whole


def shard_layout(layout: FlatLayout, position: int, ranks: int) -> FlatLayout:
    """Return the layout of shard ``position`` of ``ranks`` of every bucket, in the same buckets.

    A slot holds the elements of one parameter that are in the shard; the zeros that pad a bucket have one of their own.
    """
    slots: list[Slot] = []
    buckets: list[tuple[int, int]] = []
    for index, (first, last) in enumerate(layout.buckets):
        begin, end = layout.bucket_range(index)
        length = -(-(end - begin) // ranks)
        low = begin + position * length
        start = slots[-1].stop if slots else 0
        before, filled = len(slots), start
        for slot in layout.slots[first:last]:
            a, b = max(low, slot.start), min(low + length, slot.stop)
            if a < b:
                stop = filled + b - a
                slots.append(replace(slot, shape=(b - a,), start=filled, stop=stop, shard=whole((b - a,))))
                filled = stop
        if filled < start + length:
            padding = start + length - filled
            slots.append(Slot(f"padding.{index}", (padding,), filled, start + length, False, whole((padding,))))
        buckets.append((before, len(slots)))
    return FlatLayout(tuple(slots), tuple(buckets))
