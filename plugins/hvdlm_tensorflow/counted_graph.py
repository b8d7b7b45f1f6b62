"""Graphs whose collectives are counted and in the ledger: a graph calls them when it is traced, then only runs them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import tensorflow as tf

from hvdlm.communication.traffic import TrafficCounters
from hvdlm.diagnostics.flight_recorder import Call
from hvdlm.protocols.types import Traffic

Moved = list[dict[str, Traffic]]


class CountedGraph:
    """A ``tf.function``: what its trace counted and wrote into the ledger, every later run of it does again."""

    def __init__(self, function: Callable[..., Any], counters: TrafficCounters, **options: Any) -> None:
        # Nothing of it needs rewriting by AutoGraph, in whose files call sites would lie.
        self._graph, self._counters = tf.function(function, autograph=False, **options), counters
        self._moved: dict[Hashable, Moved] = {}
        self._calls: dict[Hashable, list[Call]] = {}

    def __call__(self, key: Hashable, *arguments: Any) -> Any:
        """Run the graph; ``key`` and the arguments' shapes tell which trace it is."""
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
