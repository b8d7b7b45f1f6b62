"""Graphs whose collectives are counted and in the ledger: a graph calls them when it is traced, then only runs them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import tensorflow as tf

from hvdlm.interfaces import Traffic
from hvdlm.watch.ledger import Call
from hvdlm_sharding.axes import Wire

Moved = list[dict[str, Traffic]]


class CountedGraph:
    """A ``tf.function``: what its trace counted and wrote into the ledger, every later run of it does again."""

    def __init__(self, function: Callable[..., Any], wire: Wire, **options: Any) -> None:
        # Nothing of it needs rewriting by AutoGraph, in whose files call sites would lie.
        self._graph, self._wire = tf.function(function, autograph=False, **options), wire
        self._moved: dict[Hashable, Moved] = {}
        self._calls: dict[Hashable, list[Call]] = {}

    def __call__(self, key: Hashable, *arguments: Any) -> Any:
        """Run the graph; ``key`` and the arguments' shapes tell which trace it is."""
        key = (key, tuple(str(getattr(a, "shape", None)) for a in tf.nest.flatten(arguments)))
        before = self._wire.snapshot()
        with self._wire.ledger.graph(self._calls.get(key, ())) as calls:
            result = self._graph(*arguments)
        if calls or key not in self._calls:
            self._calls[key] = calls
        traced = self._wire.since(before)
        if any(traced) or key not in self._moved:
            self._moved[key] = traced
        else:
            self._wire.add(self._moved[key])
        self.last = self._moved[key]
        return result
