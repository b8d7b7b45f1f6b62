"""Traffic counters: the calls, bytes and seconds of collectives, by purpose and operation, and by mesh axis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import copy

from hvdlm.diagnostics.flight_recorder import FlightRecorder
from hvdlm.protocols.types import Traffic

AXIS_OF = {
    "gradients": "data",
    "parameters": "data",
    "momentum": "data",
    "ema": "data",
    "metrics": "data",
    "node": "node",
    "context": "context",
    "tensor": "tensor",
    "pipeline": "pipeline",
    "tied": "pipeline",
    "norm": "model",
}
"""The mesh axis of a collective's purpose (the first word of its name); ``model``: all ranks that hold one copy;
``node``: the data axis's ranks of one node, where those of different nodes are summed by themselves."""


def by_axis(traffic: Mapping[str, Traffic]) -> dict[str, int]:
    """Return the bytes handed to collectives along every mesh axis."""
    totals: dict[str, int] = {}
    for key, entry in traffic.items():
        axis = AXIS_OF.get(key.partition("/")[0])
        if axis:
            totals[axis] = totals.get(axis, 0) + entry.bytes
    return totals


def grown(now: Mapping[str, int], earlier: Mapping[str, int]) -> dict[str, int]:
    """Return the increase of ``by_axis`` since ``earlier``, for the axes that increased."""
    return {axis: count - earlier.get(axis, 0) for axis, count in now.items() if count > earlier.get(axis, 0)}


def snapshot(traffic: Mapping[str, Traffic]) -> dict[str, Traffic]:
    """Return a copy of the counters."""
    return {key: copy(entry) for key, entry in traffic.items()}


def since(traffic: Mapping[str, Traffic], earlier: Mapping[str, Traffic]) -> dict[str, Traffic]:
    """Return what was counted after ``earlier``, a snapshot."""
    none = Traffic()
    increase = {}
    for key, now in traffic.items():
        then = earlier.get(key, none)
        if now.calls != then.calls:
            increase[key] = Traffic(now.calls - then.calls, now.bytes - then.bytes, now.seconds - then.seconds)
    return increase


def add(traffic: dict[str, Traffic], increase: Mapping[str, Traffic]) -> None:
    """Add ``increase``: a graph counts its collectives when it is traced, and every later run of it adds them again."""
    for key, entry in increase.items():
        total = traffic.setdefault(key, Traffic())
        total.calls += entry.calls
        total.bytes += entry.bytes
        total.seconds += entry.seconds


class TrafficCounters:
    """The counters of several groups as one; a group that serves several axes is counted once.

    ``recorder``: the flight recorder of the same collectives.
    """

    def __init__(self, counters: Iterable[dict[str, Traffic]], recorder: FlightRecorder) -> None:
        self.recorder = recorder
        self._counters = list({id(counter): counter for counter in counters}.values())

    def snapshot(self) -> list[dict[str, Traffic]]:
        """Return a copy of the counters."""
        return [snapshot(counter) for counter in self._counters]

    def since(self, earlier: list[dict[str, Traffic]]) -> list[dict[str, Traffic]]:
        """Return what was counted after ``earlier``, a snapshot."""
        return [since(counter, before) for counter, before in zip(self._counters, earlier, strict=True)]

    def restore(self, earlier: list[dict[str, Traffic]]) -> None:
        """Set the counters back to ``earlier``, a snapshot."""
        for counter, before in zip(self._counters, earlier, strict=True):
            counter.clear()
            counter.update(before)

    def add(self, increases: list[dict[str, Traffic]]) -> None:
        """Add to every counter."""
        for counter, increase in zip(self._counters, increases, strict=True):
            add(counter, increase)

    def waited(self, increases: list[dict[str, Traffic]], seconds: float) -> None:
        """Add the blocked seconds of a whole step to its first kind of collective that isn't the metrics'."""
        for counter, increase in zip(self._counters, increases, strict=True):
            for key in increase:
                if not key.startswith("metrics"):
                    counter[key].seconds += seconds
                    return

    def traffic(self) -> dict[str, Traffic]:
        """Return the sum of all counters, by ``purpose/operation``."""
        totals: dict[str, Traffic] = {}
        for counter in self._counters:
            add(totals, counter)
        return totals
