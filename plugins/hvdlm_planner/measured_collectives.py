"""Seconds of collectives between the ranks of this launch, by size and group, as training calls them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from hvdlm.diagnostics.phases import process
from hvdlm.planning.hardware import MeasuredCollective
from hvdlm.protocols.framework import Framework
from hvdlm.protocols.group import Group
from hvdlm.protocols.world import World
from hvdlm_planner.timed_steps import Ranks

OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast")
SIZES = (64, 4096, 65536, 2**20, 2**22, 2**23)  # bytes of the whole tensor
_BY_LATENCY = 2**16  # bytes up to which the seconds may be those of the latency
_ALWAYS = 2**20  # bytes up to which sizes are measured however long they take
_CALLS = (15, 7)  # of a size that is measured by its latency, and of a larger one
_LONGEST = 0.6  # seconds of a call: larger sizes follow from the last two
_SLOW = 0.1  # seconds of a call that is made three times only
# Seconds between two calls. Horovod's thread begins a cycle at most every millisecond: right after a barrier, a call
# would wait for the rest of it (0.64 ms instead of 0.13 ms), as calls in a step, with computation between them, don't.
_PAUSE = 0.002


def measure(ranks: Ranks, goes_on: Callable[[], bool] = lambda: True) -> list[MeasuredCollective]:
    """Return the tables of every operation, for a pair of ranks and for all of them. All ranks call.

    ``goes_on()``: whether there is time for larger sizes, the same on all ranks.
    """
    world, framework = ranks.world, ranks.framework
    tables = []
    for group in _groups(ranks):
        for operation in OPERATIONS:
            tables.append(_table(operation, group, world, framework, goes_on))
            process.alive()
    return tables


def _groups(ranks: Ranks) -> list[Group]:
    """Return this rank's group of each measured size: neighbours, and all ranks."""
    world = ranks.world
    pairs = [mesh for mesh in ranks.meshes if mesh.tensor == 2]
    shapes = [pairs[0].group("tensor", world.rank)] if pairs and world.size > 2 else []
    return [world.group(shape) for shape in (*shapes, tuple(range(world.size)))]


def _table(
    operation: str, group: Group, world: World, framework: Framework, goes_on: Callable[[], bool]
) -> MeasuredCollective:
    """Return the seconds of one operation; groups of the same size call it at the same time, as in training."""
    measured: list[float] = []
    for index, size in enumerate(SIZES):
        if index and not goes_on():
            break
        if size > _ALWAYS and measured[-1] * size / SIZES[index - 1] > _LONGEST:
            break
        calls = _CALLS[size > _BY_LATENCY]
        measured.append(seconds_of(_call(operation, group, framework, size), calls, group, world))
    link = "node" if world.local_size == world.size else "network"
    members = len(group.ranks)
    done = tuple(float(size) for size in SIZES[: len(measured)])
    # Fewer bytes don't take longer: a figure above one of more bytes is an outlier.
    seconds = tuple(min(measured[index:]) for index in range(len(measured)))
    return MeasuredCollective(operation, members, done, seconds, link, framework.name, world.local_size)


def _call(operation: str, group: Group, framework: Framework, size: int) -> Callable[[], Any]:
    """Return a function that starts the collective and waits for it."""
    members = len(group.ranks)
    elements = max(members, size // 4 // members * members)
    tensor = framework.tensor(np.ones(elements // members if operation == "all_gather" else elements, np.float32))
    name = f"measure.{operation}"
    if operation == "broadcast":
        return lambda: group.broadcast_async(tensor, 0, name).wait()
    start = getattr(group, f"{operation}_async")
    return lambda: start(tensor, name).wait()


def seconds_of(
    call: Callable[[], Any], calls: int, group: Group, world: World, middle: Callable[[Any], Any] = np.median
) -> float:
    """Return the median over ``calls`` calls of the slowest rank's seconds; each call follows a barrier and a pause.

    ``middle``: what is returned in place of the median.
    """
    call()
    own = []
    for _ in range(calls):
        group.barrier()
        time.sleep(_PAUSE)
        began = time.perf_counter()
        call()
        own.append(time.perf_counter() - began)
        if len(own) == 3 and world.any(max(own) > _SLOW):
            break
    return float(middle(np.max(world.gather_objects(own), axis=0)))
