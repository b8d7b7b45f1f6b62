"""What ZeRO-3 holds and sends in a micro-batch: the steps of a rank that gathers its parameters layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from hvdlm.parallel.flat_layout import FlatLayout, Slot
from hvdlm.parallel.held_bytes import HeldBytes
from hvdlm.parallel.layer_units import EMBEDDING, HEAD, Unit, units_of


class Gathers(NamedTuple):
    """How often a unit's parameters are gathered in a micro-batch."""

    forward: int
    backward: int


def gathers_of(layout: FlatLayout, tied: bool) -> list[tuple[Unit, Gathers]]:
    """Return the units in the order of the forward pass, and how often each is gathered.

    The last layer and the head stay from one pass to the other; a ``tied`` embedding is gathered for the head, too.
    """
    units = units_of(layout)
    last = units[-2].name
    counts = {EMBEDDING: Gathers(1 + tied, 0), HEAD: Gathers(1, 0), last: Gathers(1, 0)}
    return [(unit, counts.get(unit.name, Gathers(1, 1))) for unit in units]


def scattered_buckets(layout: FlatLayout, tied: bool) -> list[int]:
    """Return the buckets that are scattered in a micro-batch, in their order; a ``tied`` table's twice."""
    buckets = list(range(len(layout.buckets)))
    return [tied_bucket(layout), *buckets] if tied else buckets


def tied_bucket(layout: FlatLayout) -> int:
    """Return the bucket of the embedding's table."""
    names = [layout.slots[first].name for first, _ in layout.buckets]
    return names.index("embed.tokens")


def held_at_peak(layout: FlatLayout, ranks: int, tied: bool, in_graph: bool = False) -> dict[str, int]:
    """Return the bytes of gathered parameters, and of gradients computed or under way, when most are held at once.

    ``in_graph``: as the edges of TensorFlow's graph bound them, not as PyTorch's plugin takes and frees memory.
    """
    if in_graph:
        parameters, gradients = max(_moments(layout, ranks, tied), key=sum)
        return {"parameters": parameters, "gradients": gradients}
    return _MicroBatch(layout, ranks, tied).held_at_peak()


def _moments(layout: FlatLayout, ranks: int, tied: bool) -> Iterator[tuple[int, int]]:
    """Yield the bytes of parameters and gradients at the moments of a micro-batch at which a graph holds most."""
    units = units_of(layout)
    embedding, *layers, head = (4 * unit.size for unit in units)
    starts = [layout.bucket_range(unit.buckets[0]) for unit in units[1:-1]]
    firsts = [4 * (stop - start) for start, stop in starts]  # the buckets of layers that are scattered first
    of_head = head + embedding * tied
    yield embedding + layers[0], 0
    for own, following in zip(layers, [*layers[1:], of_head], strict=True):
        yield max(2 * own, own + following), 0  # what is received, and its copy by parameters
    yield layers[-1] + of_head, of_head
    under_way = of_head + of_head // ranks  # gradients of the layer above, and this rank's shard of them
    for number in reversed(range(len(layers))):
        own, below = layers[number], layers[number - 1] if number else 0
        received = own if number == len(layers) - 1 else 2 * own
        yield max(received, own + below), under_way
        yield own + below, own
        under_way = own - firsts[number] + own // ranks  # the layer below waits for the first bucket
    yield 0, max(layers[0] + layers[0] // ranks, embedding + embedding // ranks)


class _MicroBatch:
    """One micro-batch's passes, as PyTorch's plugin does them."""

    def __init__(self, layout: FlatLayout, ranks: int, tied: bool) -> None:
        self._layout = layout
        self._ranks = ranks
        self._units = units_of(layout)
        self._phases = {unit.name: [unit] for unit in self._units}
        if tied:
            self._phases[HEAD].append(self._units[0])
        self._held = HeldBytes("parameters", "gradients")
        self._there: dict[str, int] = {}  # bytes of units that are gathered or under way
        self._filled: set[str] = set()  # of those, the ones whose parameters have their values
        self._in_flight: list[int] = []  # bytes of buckets with their results
        self._most = 4 * max(unit.size for unit in self._units)
        self._scattered = scattered_buckets(layout, tied)

    def held_at_peak(self) -> dict[str, int]:
        """Do the passes; return the bytes."""
        embedding, *layers, head = self._units
        for unit, following in zip([embedding, *layers], [*layers, head], strict=True):
            self._gather(unit, following)
            if unit is not layers[-1]:
                self._free(unit)
        self._gather(head, None)
        if len(self._phases[HEAD]) > 1:
            self._scatter(tied_bucket(self._layout), head)
        below: list[Unit | None] = [None, *layers[-2::-1], None, None]
        for unit, next_unit in zip([head, *layers[::-1], embedding], below, strict=True):
            if unit in layers:
                self._gather(unit, next_unit)
            for index in range(*unit.buckets):
                self._scatter(index, unit)
            self._free(unit)
        return self._held.at_peak

    def _gather(self, unit: Unit, following: Unit | None) -> None:
        for one in self._phases[unit.name]:
            self._start(one)
            if one.name not in self._filled and one.name not in (EMBEDDING, HEAD):
                self._held.take("parameters", 4 * one.size)  # a copy, whose source is freed
                self._held.free("parameters", 4 * one.size)
            self._filled.add(one.name)
        for one in self._phases[following.name] if following else ():
            self._start(one)

    def _start(self, unit: Unit) -> None:
        if unit.name not in self._there:
            self._there[unit.name] = 4 * unit.size
            self._held.take("parameters", 4 * unit.size)

    def _free(self, unit: Unit) -> None:
        for one in self._phases[unit.name]:
            self._held.free("parameters", self._there.pop(one.name, 0))
            self._filled.discard(one.name)

    def _scatter(self, index: int, unit: Unit) -> None:
        """Compute the gradients of a bucket, and start to scatter it; ``unit``: whose backward pass it is."""
        first, last = self._layout.buckets[index]
        slots = self._layout.slots[first:last]
        for slot in slots:
            self._held.take("gradients", 4 * _size(slot))
            if unit.name == HEAD and len(slots) == 1:
                self._release(index)
        size = self._size_of(index)
        if len(slots) > 1 or 4 * _size(slots[0]) < size:  # copied into one vector
            self._held.take("gradients", size)
            self._held.free("gradients", 4 * sum(map(_size, slots)))
        self._held.take("gradients", size // self._ranks)
        self._in_flight.append(size + size // self._ranks)
        self._scattered.pop(0)
        following = self._size_of(self._scattered[0]) if self._scattered else 0
        while self._in_flight and self._held.of("gradients") + following > self._most:
            self._held.free("gradients", self._in_flight.pop(0))

    def _release(self, index: int) -> None:
        """Free the head's table, whose gradient has been computed."""
        for unit in self._phases[HEAD]:
            if index in range(*unit.buckets):
                self._held.free("parameters", self._size_of(index))
                self._there[unit.name] -= self._size_of(index)

    def _size_of(self, index: int) -> int:
        start, stop = self._layout.bucket_range(index)
        return 4 * (stop - start)


def _size(slot: Slot) -> int:
    return slot.stop - slot.start
