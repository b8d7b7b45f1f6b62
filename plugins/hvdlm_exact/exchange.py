"""Sums of gradients in the order of one binary tree over the rows of the global batch (``hvdlm_language.leaf_tree``).

Each rank has added up its own leaves. What is left of the tree is added in shards: an all-to-all gives rank k the k-th
part of every rank's sums, rank k adds them in the tree's order, and an all-gather returns the total to all. Where a
rank's leaves are a power of two, that moves as many bytes as the ring of a plain all-reduce.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from typing import Any

from hvdlm.communication.all_reduce import AllReduceExchange
from hvdlm.config import Config
from hvdlm.protocols.group import Converted, Done, Group, Handle
from hvdlm.protocols.types import Tensor
from hvdlm_language.leaf_tree import LeafTree, sum_of_leaves

# Buckets whose parts travel while an older one is added up and gathered, so that the wire is never idle in a backward
# pass, and both halves of the exchange overlap with it.
_SENT_AHEAD = 2


class ExactExchange(AllReduceExchange):
    """Sums gradients of leaves; the result has the same bits on any number of ranks.

    Attributes:
        add: returns the sum of two tensors. A framework whose graphs would change the order of sums replaces it.
    """

    add: Callable[[Any, Any], Any] = staticmethod(operator.add)

    def __init__(self, group: Group, config: Config, index: int) -> None:
        super().__init__(group, config.communication)
        self._tree = LeafTree.of(config, self.size, index)
        self._in_flight: list[_TreeSum] = []

    def begin(self, step: int) -> Hashable:
        """Begin a step; return the only phase."""
        self._in_flight = []
        return None

    def start(self, bucket: Tensor, index: int) -> Handle:
        """Start to sum a bucket over the ranks.

        ``bucket`` has the roots of this rank's leaves, ``[ranks, LeafTree.roots, elements / ranks]`` made flat; the
        result is ``[elements]``. Elements are padded to a multiple of the ranks, and roots to the most of any rank.
        """
        if self.size == 1:
            return Done(bucket)
        name = f"gradients.{index}"
        handle = _TreeSum(self._group.all_to_all_async(bucket, name), self._in_flight, self._gather_sum, name)
        self._in_flight.append(handle)
        for earlier in self._in_flight[:-_SENT_AHEAD]:  # at the same point on all ranks, which call alike
            earlier.add_up()
        return handle

    def _gather_sum(self, received: Tensor, name: str) -> Handle:
        """Add the parts of all ranks, ``[ranks, roots, elements / ranks]`` made flat; start to gather the sums."""
        length = received.shape[0] // (self.size * self._tree.roots)
        roots = (received[position * length : (position + 1) * length] for position in self._tree.positions)
        return self._group.all_gather_async(self._tree.total(roots, self.add), f"{name}.sum")

    def start_metrics(self, values: Tensor) -> Handle:
        """Start to sum the metrics of this rank's leaves, ``[leaves, n]``; the result is ``[n]``."""
        gathered = Done(values) if self.size == 1 else self._group.all_gather_async(values, "metrics")
        return Converted(gathered, lambda leaves: sum_of_leaves(leaves, self._tree.leaves, self.add)[0])


class _TreeSum:
    """A bucket in flight. Waiting for one adds up all buckets, so that their gathers overlap."""

    def __init__(
        self, received: Handle, in_flight: list[_TreeSum], gather: Callable[[Tensor, str], Handle], name: str
    ) -> None:
        self._received = received
        self._in_flight = in_flight
        self._gather = gather
        self._name = name
        self._gathered: Handle | None = None

    def add_up(self) -> Handle:
        """Return the gathering of the sums, which starts once the parts of all ranks are there."""
        if self._gathered is None:
            self._gathered = self._gather(self._received.wait(), self._name)
        return self._gathered

    def wait(self) -> Tensor:
        """Return the sum."""
        for handle in self._in_flight:
            handle.add_up()
        return self.add_up().wait()
