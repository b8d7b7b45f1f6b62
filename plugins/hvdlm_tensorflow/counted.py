"""Graphs whose collectives are counted: a graph calls them once, when it is traced, and runs them ever after."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import tensorflow as tf

from hvdlm.interfaces import Traffic
from hvdlm_sharding.axes import Wire

Moved = list[dict[str, Traffic]]


class CountedGraph:
    """A ``tf.function``: what its trace counted, every later run of the same trace counts again."""

    def __init__(self, function: Callable[..., Any], wire: Wire, **options: Any) -> None:
        self._graph, self._wire = tf.function(function, **options), wire
        self._moved: dict[Hashable, Moved] = {}

    def __call__(self, key: Hashable, *arguments: Any) -> Any:
        """Run the graph; ``key`` and the arguments' shapes tell which trace it is."""
        key = (key, tuple(str(getattr(a, "shape", None)) for a in tf.nest.flatten(arguments)))
        before = self._wire.snapshot()
        result = self._graph(*arguments)
        traced = self._wire.since(before)
        if any(traced) or key not in self._moved:
            self._moved[key] = traced
        else:
            self._wire.add(self._moved[key])
        self.last = self._moved[key]
        return result
