"""Sums in two levels: whole within a node, compressed between nodes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import numpy as np
from keras import ops

from hvdlm.communication.all_reduce import AllReduceExchange
from hvdlm.config import CommunicationConfig
from hvdlm.parallel.flat_layout import FlatLayout
from hvdlm.parallel.level_shards import shard_layout
from hvdlm.protocols.exchange import RestoresState
from hvdlm.protocols.group import Group, Handle
from hvdlm.protocols.types import Tensor


class TwoLevelExchange(AllReduceExchange):
    """Sums a bucket within each node, by shards; sums each shard between the nodes; gathers the shards in each node.

    Every rank of a node sends its shard of the node's sum, compressed by ``between``, to the ranks with its position on
    the other nodes, as 2D-Torus all-reduce (Mikami et al. 2018, section 2.2) does with whole shards: nodes exchange
    1 / n of the bytes per rank, and what they compress is one gradient for every node.
    """

    def __init__(
        self, group: Group, within: Group, between: AllReduceExchange, options: CommunicationConfig, position: int
    ) -> None:
        """Sum over ``group``; ``within``: this rank's node, on which it has the index ``position``."""
        super().__init__(group, options)
        self._within = within
        self._between = between
        self._position = position
        self._in_flight: list[_TwoLevelSum] = []

    def open(self, layout: FlatLayout, parameters: np.ndarray) -> None:
        """Open the sums between nodes, of this rank's shards."""
        shards = shard_layout(layout, self._position, len(self._within.ranks))
        self._between.open(shards, np.zeros(shards.size, np.float32))

    def begin(self, step: int) -> Hashable:
        """Begin a step; return the phase of the sums between nodes."""
        self._in_flight = []
        return self._between.begin(step)

    def start(self, bucket: Tensor, index: int) -> Handle:
        """Start to sum the flat bucket within the node, and those before it between the nodes."""
        for previous in self._in_flight[-1:]:  # those before it have been sent
            previous.send()
        missing = -bucket.shape[0] % len(self._within.ranks)
        padded = ops.pad(bucket, [[0, missing]]) if missing else bucket
        handle = self._within.reduce_scatter_async(self.predivided(padded), f"node.{index}")
        started = _TwoLevelSum(self._between, self._within, handle, index, bucket.shape[0], self._in_flight)
        self._in_flight.append(started)
        return self.scaled(started)

    def keep_copies(self) -> None:
        """Copy what the sums between nodes keep where a step begins."""
        if isinstance(self._between, RestoresState):
            self._between.keep_copies()

    def settle(self, applied: Tensor) -> None:
        """Restore it unless the step is ``applied``."""
        if isinstance(self._between, RestoresState):
            self._between.settle(applied)

    def state(self) -> dict[str, np.ndarray]:
        """Return what the sums between nodes keep of this rank's shards."""
        return self._between.state()

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore what ``state`` returned."""
        self._between.load_state(state)


class _TwoLevelSum:
    """The handle of a bucket in flight; waiting for one completes all of its step."""

    def __init__(
        self,
        between: AllReduceExchange,
        within: Group,
        handle: Handle,
        index: int,
        length: int,
        in_flight: list[_TwoLevelSum],
    ) -> None:
        self._between = between
        self._within = within
        self._of_node = handle
        self._index = index
        self._length = length
        self._in_flight = in_flight
        self._of_all: Handle | None = None
        self._gathered: Handle | None = None

    def send(self) -> None:
        """Start to sum this rank's shard of the node's sum between nodes, when the node's sum is there."""
        if self._of_all is None:
            self._of_all = self._between.start(self._of_node.wait(), self._index)

    def gather(self) -> None:
        """Start to gather the shards in the node, when they are summed."""
        assert self._of_all is not None
        self._gathered = self._within.all_gather_async(self._of_all.wait(), f"node.{self._index}.sum")

    def wait(self) -> Tensor:
        """Return the sum."""
        for advance in (_TwoLevelSum.send, _TwoLevelSum.gather):
            for started in self._in_flight:
                advance(started)
        self._in_flight.clear()  # each of them refers to it
        assert self._gathered is not None
        whole_bucket = self._gathered.wait()
        return whole_bucket if whole_bucket.shape[0] == self._length else whole_bucket[: self._length]
