"""``python -m hvdlm bench``: the time of each collective by size, compared with raw MPI on the same bytes.

The two alternate call by call, each after a barrier. A collective's time is the slowest rank's, the median over calls.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hvdlm.errors import HvdlmError
from hvdlm.io.atomic_files import replace
from hvdlm.protocols.framework import Framework
from hvdlm.protocols.group import Group
from hvdlm.protocols.world import World
from hvdlm_backends.worlds import RanksWorld

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all")
_CALLS = (5, 200)  # fewest and most calls per size


@dataclass(frozen=True)
class Timing:
    """One collective at one size: ``bytes`` of a rank's input, ``seconds``, and those of raw MPI (None without MPI)."""

    collective: str
    bytes: int
    seconds: float
    raw: float | None


@dataclass(frozen=True)
class Fit:
    """Seconds = ``alpha`` + bytes * ``beta`` (Hockney 1994), fitted to relative errors."""

    alpha: float
    beta: float


def sizes(smallest: int, largest: int) -> list[int]:
    """Return byte counts from ``smallest`` to ``largest``, each four times the previous one.

    Raises:
        HvdlmError: the limits are invalid.
    """
    if not 1024 <= smallest <= largest:
        raise HvdlmError(f"--smallest {smallest} --largest {largest}: expected 1024 <= smallest <= largest (bytes).")
    steps = int(math.log(largest / smallest, 4) + 1e-9)
    return [smallest * 4**step for step in range(steps + 1)]


def call(group: Group, collective: str, tensor: Any) -> Any:
    """Run one collective of ``group`` on a flat tensor, and wait for its result."""
    name = f"bench.{collective}"
    if collective == "all_reduce":
        return group.all_reduce([tensor], name)[0]
    if collective == "broadcast":
        return group.broadcast(tensor, 0, name)
    return getattr(group, collective)(tensor, name)


def paired(
    world: World, group: Group, actions: Sequence[Callable[[], Any] | None], seconds: float
) -> list[float | None]:
    """Return the median seconds of each action (None for None); the actions alternate, for about ``seconds`` seconds.

    All ranks call.
    """
    present = [action for action in actions if action]
    for action in present:
        action()
    began = time.perf_counter()
    for action in present:
        action()
    first_round = max(world.gather_objects(time.perf_counter() - began))
    calls = min(_CALLS[1], max(_CALLS[0], round(seconds / max(first_round, 1e-6))))
    medians = iter(np.median(turns(world, group, present, calls), axis=1).tolist())
    return [next(medians) if action else None for action in actions]


def turns(world: World, group: Group, actions: Sequence[Callable[[], Any]], calls: int) -> list[list[float]]:
    """Return the seconds of ``calls`` calls of each action, of the slowest rank each. All ranks call."""
    seconds: list[list[float]] = [[] for _ in actions]
    for turn in range(calls):
        for number in range(len(actions)) if turn % 2 else reversed(range(len(actions))):
            group.barrier()
            began = time.perf_counter()
            actions[number]()
            seconds[number].append(time.perf_counter() - began)
    return np.max(world.gather_objects(seconds), axis=0).tolist()


def raw_call(world: World, collective: str, array: np.ndarray, in_place: bool) -> Callable[[], Any] | None:
    """Return a function that runs the transport's own collective on flat ``array``, without hvdlm in between.

    ``collective`` is the name of a Group's method, ``in_place`` whether a sum overwrites its input. None where the
    transport can't be called directly.
    """
    return world.raw(collective, array, in_place) if isinstance(world, RanksWorld) else None


def measure(
    world: World, framework: Framework, collectives: Sequence[str], counts: Sequence[int], seconds_each: float
) -> list[Timing]:
    """Return the timings of every collective at every size, in about ``seconds_each`` seconds each. All ranks call."""
    group, timings = world.group(range(world.size)), []
    for collective in collectives:
        for count in counts:
            elements = max(world.size, count // 4 // world.size * world.size)
            array = np.ones(elements, np.float32)
            tensor = framework.tensor(array)
            raw = raw_call(world, collective, array.copy(), framework.in_place)
            actions = [partial(call, group, collective, tensor), raw]
            seconds, raw_seconds = paired(world, group, actions, seconds_each)
            assert seconds is not None
            timings.append(Timing(collective, 4 * elements, seconds, raw_seconds))
            if world.rank == 0:
                print(_line(timings[-1]), flush=True)
    return timings


def fit(points: Sequence[tuple[int, float]]) -> Fit:
    """Return alpha and beta of (bytes, seconds) by least squares on relative errors; neither below zero."""
    counts, seconds = (np.array(column, float) for column in zip(*points, strict=True))
    system = np.stack([1.0 / seconds, counts / seconds], axis=1)
    alpha, beta = np.linalg.lstsq(system, np.ones(len(counts)), rcond=None)[0]
    if alpha < 0:
        return Fit(0.0, float(np.sum(counts / seconds) / np.sum((counts / seconds) ** 2)))
    if beta < 0:
        return Fit(float(np.sum(1 / seconds) / np.sum(1 / seconds**2)), 0.0)
    return Fit(float(alpha), float(beta))


def report(timings: Sequence[Timing], about: dict[str, Any]) -> dict[str, Any]:
    """Return the content of the JSON file: every timing, and the fits of each collective."""
    collectives = {}
    for name in dict.fromkeys(t.collective for t in timings):
        of_name = [t for t in timings if t.collective == name]
        entry: dict[str, Any] = {
            "sizes": [{"bytes": t.bytes, "seconds": t.seconds, "raw_seconds": t.raw} for t in of_name],
            "fit": vars(fit([(t.bytes, t.seconds) for t in of_name])),
            "raw_fit": None,
        }
        raw = [(t.bytes, t.raw) for t in of_name if t.raw is not None]
        if raw:
            entry["raw_fit"] = vars(fit(raw))
            entry["ratio"] = statistics.median(t.seconds / t.raw for t in of_name if t.raw is not None)
        collectives[name] = entry
    return {**about, "collectives": collectives}


def main(
    world: World,
    framework: Framework,
    collectives: Sequence[str],
    counts: Sequence[int],
    seconds: float,
    output: Path,
) -> None:
    """Measure every size for about ``seconds`` seconds, print, and write ``output`` (JSON) and a plot beside it.

    All ranks call.
    """
    if world.size == 1:
        raise HvdlmError("bench measures communication between ranks: start at least 2, horovodrun -np 2 ...")
    timings = measure(world, framework, collectives, counts, seconds)
    if world.rank != 0:
        return
    results = report(timings, {"framework": framework.name, "ranks": world.size, "transport": world.transport})
    for name, entry in results["collectives"].items():
        raw = f"; raw MPI {_describe_fit(entry['raw_fit'])}" if entry["raw_fit"] else ""
        print(f"{name:<15} {_describe_fit(entry['fit'])}{raw}")
    output.parent.mkdir(parents=True, exist_ok=True)
    replace(output, json.dumps(results, indent=1) + "\n")
    print(f"written: {output}{_plot(timings, output.with_suffix('.svg'))}", flush=True)


def _line(timing: Timing) -> str:
    text = f"{timing.collective:<15} {timing.bytes:>11,} B {1e6 * timing.seconds:>12,.1f} us"
    text += f" {timing.bytes / timing.seconds / 1e9:>8.3f} GB/s"
    return text if timing.raw is None else f"{text}   raw MPI {1e6 * timing.raw:>12,.1f} us"


def _describe_fit(values: dict[str, float]) -> str:
    bandwidth = f"{1e-9 / values['beta']:.2f} GB/s" if values["beta"] else "no cost by size"
    return f"latency {1e6 * values['alpha']:.1f} us, {bandwidth}"


def _plot(timings: Sequence[Timing], path: Path) -> str:
    """Plot time over size, both logarithmic; return a text with the plot's path."""
    try:
        import matplotlib
    except ImportError:
        return " (no plot: pip install 'hvdlm[plot]')"
    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name in dict.fromkeys(t.collective for t in timings):
        of_name = [t for t in timings if t.collective == name]
        (line,) = axes.loglog([t.bytes for t in of_name], [t.seconds for t in of_name], "o-", label=name)
        raw = [(t.bytes, t.raw) for t in of_name if t.raw is not None]
        if raw:
            axes.loglog(*zip(*raw, strict=True), "x:", color=line.get_color(), label=f"{name}, raw MPI")
    axes.set(xlabel="bytes per rank", ylabel="seconds")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path)
    pyplot.close(figure)
    return f", {path}"
