"""Graphs whose collectives are counted and recorded.

Python calls the collectives of a graph only while it is traced. Every later run of the graph repeats in the traffic
counters and in the flight recorder what its trace wrote there.

Without a twin: in PyTorch, Python calls every collective of every step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any

import tensorflow as tf

from hvdlm.communication.traffic import TrafficCounters
from hvdlm.diagnostics.flight_recorder import Call
from hvdlm.diagnostics.phases import READING, process
from hvdlm.protocols.types import Traffic

Moved = list[dict[str, Traffic]]
_tracing = threading.RLock()  # a graph may trace others


class CountedGraph:
    """A ``tf.function``. ``last``: what the collectives of the latest run moved, by group."""

    last: Moved

    def __init__(self, function: Callable[..., Any], counters: TrafficCounters, **options: Any) -> None:
        self._function = function
        self._counters = counters
        self._options = options
        self.forget_traces()

    def forget_traces(self) -> None:
        """Have the function traced anew by the next call."""
        # Without AutoGraph, which nothing here needs: call sites would lie in the files that it generates.
        self._graph = tf.function(self._trace, autograph=False, **self._options)
        self._moved: dict[Hashable, Moved] = {}
        self._calls: dict[Hashable, list[Call]] = {}

    def _trace(self, *arguments: Any) -> Any:
        # The phase is seen by ranks that have traced their graphs, and wait. Ranks may be threads of one process.
        with process.during("tracing a graph", patience=READING), _tracing:
            return self._function(*arguments)

    def __call__(self, key: Hashable, *arguments: Any) -> Any:
        """Run the graph; ``key`` and the arguments' shapes identify the trace."""
        key = (key, tuple(str(getattr(a, "shape", None)) for a in tf.nest.flatten(arguments)))
        before = self._counters.snapshot()
        with self._counters.recorder.graph(self._calls.get(key, ())) as calls:
            result = self._graph(*arguments)
        if calls or key not in self._calls:
            self._calls[key] = calls
        traced = self._counters.since(before)
        if any(traced) or key not in self._moved:
            self._moved[key] = traced
        else:
            self._counters.add(self._moved[key])
        self.last = self._moved[key]
        return result
