"""Measurements before the first step: the wire, what compressors compute on this model's buckets, a forward pass.

All ranks measure at the same time, since they may share cores and links, and use the slowest rank's figures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from keras import ops

from hvdlm.diagnostics.phases import process
from hvdlm.parallel.flat_layout import FlatLayout, Slot
from hvdlm.protocols.group import Group
from hvdlm.protocols.task import Task
from hvdlm.protocols.trainable import Trainable
from hvdlm.protocols.world import World
from hvdlm_auto.decisions import BucketCost, Candidate, Line
from hvdlm_auto.echo import EchoGroup
from hvdlm_auto.exchange import AutomaticExchange
from hvdlm_auto.layouts import elements_of, merges
from hvdlm_planner.measured_collectives import seconds_of

Collectives = list[tuple[str, float, int]]
"""Of one bucket: (operation and dtype, bytes that a rank hands over, round)."""

SMALL = 4096  # bytes of a collective whose seconds are those of the latency
LARGE = (2**16, 2**18, 2**20, 2**22)  # bytes of each collective of the bandwidth; the first that take long enough
LONG, LONGEST = 0.03, 0.5  # seconds of such a call: enough, if it is ENOUGH times a small one; in any case
ENOUGH = 5.0
IN_FLIGHT = 4  # collectives at once, as in a step; a link's queues would let a single one pass faster than many
CALLS = (9, 5)  # of small and of large collectives
ENOUGH_SECONDS = 0.2  # of repeating a compressor, or a forward pass
SAMPLE = 2**21  # elements of the bucket on which compressors are timed
PLAIN = "all_reduce float32"


def measure_wire(kinds: Iterable[str], group: Group, world: World) -> dict[str, Line]:
    """Return the seconds of every kind of collective in ``group``. All ranks call, with the same kinds."""
    lines = {}
    for kind in kinds:
        lines[kind] = _line(kind, group, world)
        process.alive()
    return lines


def _line(kind: str, group: Group, world: World) -> Line:
    # The least seconds: other work on the machine only adds to them, and a difference of two medians may be negative.
    small = seconds_of(_calls(kind, SMALL, 1, group), CALLS[0], group, world, np.min)
    for size in LARGE:
        large = seconds_of(_calls(kind, size, IN_FLIGHT, group), CALLS[1], group, world, np.min)
        if large >= LONGEST or large >= max(LONG, ENOUGH * small):
            break
    sent = IN_FLIGHT * size
    # Where a large call takes hardly longer, no bandwidth follows from the difference, and the quotient is a bound.
    return Line(small, (large - small) / (sent - SMALL) if large > 1.5 * small else large / sent)


def _calls(kind: str, size: int, count: int, group: Group) -> Callable[[], Any]:
    """Return a function that starts ``count`` collectives of ``size`` bytes a rank, and waits for all."""
    operation, dtype = kind.split()
    random = np.random.default_rng(0)
    if dtype in ("uint8", "int8"):
        tensor = ops.convert_to_tensor(random.integers(0, 127, size).astype(dtype))
    else:  # the exponents of gradients, which are coded on slow networks, are those of normal values
        elements = size // (4 if dtype == "float32" else 2)
        tensor = ops.cast(ops.convert_to_tensor(random.normal(size=elements).astype(np.float32)), dtype)
    start = getattr(group, f"{operation}_async")

    def call() -> None:
        names = [f"measure.{operation}.{dtype}.{number}" for number in range(count)]
        handles = [start(ops.copy(tensor), name) for name in names]  # sums may overwrite it
        for handle in handles:
            handle.wait()

    return call


@dataclass(frozen=True)
class Computed:
    """What a method computes and sends for a sample of a bucket, for each of its elements."""

    start: float
    finish: float
    sent: Mapping[tuple[str, int], float]

    def to_json(self) -> list[Any]:
        """Return the seconds, for a message between hosts; what is sent is the same on all ranks."""
        return [self.start, self.finish]


def compressor_cost(exchange: AutomaticExchange, name: str) -> Computed:
    """Return what compressor ``name`` computes on a sample of the model's largest bucket. No communication."""
    echo = EchoGroup(exchange.size)
    compressed = exchange.compressed(name, echo)
    layout = sample_of(exchange.layout)
    values = np.random.default_rng(1).normal(size=layout.size).astype(np.float32)
    bucket = ops.convert_to_tensor(values)
    compressed.open(layout, values[:0])
    seconds: list[tuple[float, float]] = []
    for step in range(4):  # the first call allocates memory and builds what is built once
        if len(seconds) > 1 and sum(map(sum, seconds)) > ENOUGH_SECONDS:
            break
        echo.sent.clear()
        compressed.begin(step)
        summed = ops.copy(bucket)  # sums may overwrite it
        began = time.perf_counter()
        handle = compressed.start(summed, 0)
        started = time.perf_counter()
        ops.convert_to_numpy(handle.wait()[:1])  # a device has computed it
        seconds.append((started - began, time.perf_counter() - started))
    start, finish = (min(column) / layout.size for column in zip(*seconds[1:], strict=True))
    sent = {key: size / layout.size for key, size in echo.sent.items()}
    return Computed(start, finish, sent)


def copy_cost(layout: FlatLayout) -> float:
    """Return the seconds in which an element is copied, as buckets that are sent together are, and back."""
    halves = [ops.convert_to_tensor(np.ones(min(layout.size, SAMPLE) // 2 + 1, np.float32))] * 2
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        ops.convert_to_numpy(ops.concatenate(halves)[:1])
        seconds.append(time.perf_counter() - began)
    return min(seconds) / (2 * int(halves[0].shape[0]))


def sample_of(layout: FlatLayout) -> FlatLayout:
    """Return a layout of one bucket, the largest of ``layout``, of at most about ``SAMPLE`` elements."""
    ranges = [layout.bucket_range(index) for index in range(len(layout.buckets))]
    largest = max(range(len(ranges)), key=lambda index: ranges[index][1] - ranges[index][0])
    first, last = layout.buckets[largest]
    slots: list[Slot] = []
    start = 0
    for slot in layout.slots[first:last]:
        row = (slot.stop - slot.start) // slot.shape[0]
        rows = max(1, min(slot.shape[0], (SAMPLE - start) // row))
        slots.append(replace(slot, start=start, stop=start + rows * row, shape=(rows, *slot.shape[1:])))
        start += rows * row
        if start >= SAMPLE:
            break
    return FlatLayout(tuple(slots), ((0, len(slots)),))


def forward_seconds(trainable: Trainable, task: Task, rank: int, size: int, rows: int) -> float:
    """Return the seconds of a forward pass of ``rows`` on this rank; 0 where it has no validation rows.

    No communication.
    """
    batch = next(iter(task.validation(rank, size)), None)
    if batch is None:
        return 0.0
    batch = batch.rows(0, min(rows, len(batch.inputs)))
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < 4 and sum(seconds[1:]) < ENOUGH_SECONDS):  # the first builds a graph
        began = time.perf_counter()
        trainable.eval_step(batch)
        seconds.append(time.perf_counter() - began)
        process.alive()
    return min(seconds[1:]) * rows / len(batch.inputs)


def collectives_of(
    layout: FlatLayout, bucket_bytes: int, computed: Mapping[str, Computed]
) -> dict[str, list[Collectives]]:
    """Return the collectives of every method and bucket; ``computed``: by compressor."""
    sizes = elements_of(layout)
    known: dict[str, list[Collectives]] = {}
    for name, runs in merges(layout, bucket_bytes).items():
        known[name] = [[] for _ in sizes]
        for run in runs:
            known[name][run[-1]] = [(PLAIN, 4.0 * sum(sizes[index] for index in run), 0)]
    for name, own in computed.items():
        known[name] = [[(kind, share * size, number) for (kind, number), share in own.sent.items()] for size in sizes]
    return known


def candidates_of(
    layout: FlatLayout,
    collectives: Mapping[str, Sequence[Collectives]],
    seconds: Mapping[str, Sequence[float]],
    gaps: Mapping[str, float],
    wire: Mapping[str, Line],
) -> list[Candidate]:
    """Return every method with its seconds; ``seconds``: of an element's start and finish, by method."""
    sizes, candidates = elements_of(layout), []
    for name, buckets in collectives.items():
        start, finish = seconds.get(name, (0.0, 0.0))
        costs = []
        for size, sent in zip(sizes, buckets, strict=True):
            rounds = [sum(wire[k].seconds(n) for k, n, r in sent if (r > 0) is later) for later in (False, True)]
            costs.append(BucketCost(start * size, rounds[0], rounds[1], finish * size))
        candidates.append(Candidate(name, gaps.get(name, 0.0), tuple(costs)))
    return candidates
