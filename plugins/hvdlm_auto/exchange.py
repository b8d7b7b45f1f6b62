"""The exchange of ``communication.auto``: sums gradients by the method that its log names for a step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from keras import ops

from hvdlm.communication.all_reduce import AllReduceExchange
from hvdlm.config import CommunicationConfig
from hvdlm.parallel.flat_layout import FlatLayout
from hvdlm.protocols.exchange import RestoresState
from hvdlm.protocols.group import Group, Handle
from hvdlm.protocols.types import Tensor
from hvdlm_auto.decision_log import ENTRY, DecisionLog, read_log
from hvdlm_auto.layouts import DENSE, TOGETHER, runs_of
from hvdlm_compression.exchange import CompressedExchange


class MergedSums(AllReduceExchange):
    """Sums several buckets by one collective, which is started when the last of them is complete."""

    def __init__(self, group: Group, options: CommunicationConfig, factor: float) -> None:
        super().__init__(group, options)
        self._least = factor * options.bucket_bytes
        self._runs: dict[int, list[int]] = {}  # by their last bucket
        self._waiting: list[tuple[Tensor, _Slice]] = []

    def open(self, layout: FlatLayout, parameters: np.ndarray) -> None:
        """Decide which buckets are sent together."""
        self._runs = {run[-1]: run for run in runs_of(layout, self._least)}

    def begin(self, step: int) -> Hashable:
        """Begin a step; return the only phase."""
        self._waiting = []
        return None

    def start(self, bucket: Tensor, index: int) -> Handle:
        """Keep the bucket, and start to sum those that are waiting where it is the last of them."""
        if not self._waiting and index in self._runs:
            return super().start(bucket, index)
        start = sum(int(tensor.shape[0]) for tensor, _ in self._waiting)
        handle = _Slice(start, start + int(bucket.shape[0]))
        self._waiting.append((bucket, handle))
        if index in self._runs:
            total = _Once(super().start(ops.concatenate([tensor for tensor, _ in self._waiting]), index))
            for _, waiting in self._waiting:
                waiting.total = total
            self._waiting = []
        return handle


class _Once:
    """A sum that several handles wait for."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle
        self._result: Tensor | None = None

    def wait(self) -> Tensor:
        """Return the sum."""
        if self._result is None:
            self._result = self._handle.wait()
        return self._result


class _Slice:
    """One bucket's elements of a sum, which is set when it is started."""

    total: _Once

    def __init__(self, start: int, stop: int) -> None:
        self._range = slice(start, stop)

    def wait(self) -> Tensor:
        """Return them."""
        return self.total.wait()[self._range]


class AutomaticExchange(AllReduceExchange):
    """Passes every step to the method that ``log`` names for it. A method that is switched to starts afresh.

    Attributes:
        log: what the ranks have decided.
        next_step: the first step that has not begun: the earliest that a decision can be for.
    """

    def __init__(
        self, group: Group, options: CommunicationConfig, compressed: Callable[[str, Group], CompressedExchange]
    ) -> None:
        super().__init__(group, options)
        self.traits = replace(self.traits, replicated=("auto/", "factor/"))
        self.log = DecisionLog()
        self.next_step = 0
        self.compressed = compressed
        self._options = options
        self._keeps_copies = False
        self._methods: dict[str, Any] = {DENSE: AllReduceExchange(group, options)}
        self._active: Any = self._methods[DENSE]

    def open(self, layout: FlatLayout, parameters: np.ndarray) -> None:
        """Start by dense sums."""
        self.layout = layout
        self._parameters = parameters[:0]  # methods need no values
        for method in self._methods.values():
            method.open(layout, parameters)
        self._activate(DENSE)

    def _activate(self, name: str) -> None:
        """Make ``name`` the method, with an empty state. One object a method: graphs refer to its variables."""
        if name not in self._methods:
            factor = TOGETHER.get(name)
            options, group = self._options, self._group
            self._methods[name] = MergedSums(group, options, factor) if factor else self.compressed(name, group)
            self._keep_copies_of(self._methods[name])
        self._active, self.log.active = self._methods[name], name
        self._active.open(self.layout, self._parameters)

    def keep_copies(self) -> None:
        """Copy what methods keep where a step begins."""
        self._keeps_copies = True
        for method in self._methods.values():
            self._keep_copies_of(method)

    def _keep_copies_of(self, method: Any) -> None:
        if self._keeps_copies and isinstance(method, RestoresState):
            method.keep_copies()

    def settle(self, applied: Tensor) -> None:
        """Restore what the method keeps unless the step is ``applied``."""
        if isinstance(self._active, RestoresState):
            self._active.settle(applied)

    def begin(self, step: int) -> Hashable:
        """Begin a step; return its method and the method's own phase."""
        self.next_step = step + 1
        name = self.log.method(step)
        if name != self.log.active:
            self._activate(name)
        return f"{name}/{self._active.begin(step)}"

    def start(self, bucket: Tensor, index: int) -> Handle:
        """Start to sum the flat bucket by the step's method."""
        handle: Handle = self._active.start(bucket, index)
        return handle

    def residual(self) -> float | None:
        """Return the norm of this rank's error feedback, in the scale of its buckets; None: the method keeps none."""
        return self._active.error_norm() if isinstance(self._active, CompressedExchange) else None

    def state(self) -> dict[str, np.ndarray]:
        """Return the log, and what the method keeps."""
        return self.log.state() | self._active.state()

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore what ``state`` returned."""
        if ENTRY not in state:
            self.log = DecisionLog()
            return
        self.log = read_log(state[ENTRY])
        self._activate(self.log.active)
        self._active.load_state({name: array for name, array in state.items() if name != ENTRY})
