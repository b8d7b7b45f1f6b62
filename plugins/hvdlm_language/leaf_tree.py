"""The order of exact sums: one binary tree over the leaves of a global batch, whoever computes them.

A leaf is a fixed number of consecutive rows of the global batch. Node ``(level, i)`` is the sum of the leaves from
``i * 2**level`` up to ``(i + 1) * 2**level``, as far as the batch has them: the sum of its two halves, or its left half
alone. Floating-point sums depend on their order, and this order depends on the number of leaves alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from hvdlm.config import Config

Node = tuple[int, int]
T = TypeVar("T")


class LeafTree:
    """The tree over ``leaves``, of which ``ranks`` data ranks compute equally many each, in their order.

    A rank adds up what lies within its own leaves, by a stack of sums as in a binary counter: a new sum is joined with
    the sums on top of the stack for as long as both are halves of one node. What is left are the rank's roots, one if
    its leaves are a power of two, and at most twice the logarithm of their number.

    Attributes:
        first: this rank's first leaf.
        count: leaves of a rank.
        joins: for each leaf of this rank, with how many sums on top of the stack it is joined.
        depth: the most sums that this rank has in the stack below the newest.
        roots: the most roots of any rank.
        positions: the indices of the ranks' roots in ``[ranks * roots]``, in the order of the leaves.
    """

    def __init__(self, leaves: int, ranks: int, rank: int) -> None:
        self.leaves = leaves
        self.count = leaves // ranks
        self.first = rank * self.count
        covers: list[list[Node]] = []
        for number in range(ranks):
            stack: list[Node] = []
            first = number * self.count
            steps = [(self._push(stack, (0, leaf)), len(stack)) for leaf in range(first, first + self.count)]
            if number == rank:
                self.joins = [joined for joined, _ in steps]
                # Before a leaf is joined, it is on top of all that stood there; it is added to the newest in position.
                self.depth = max(0, *(height - 1 + max(0, joined - 1) for joined, height in steps))
            covers.append(stack)
        self.roots = max(map(len, covers))
        self.positions = [r * self.roots + i for r, cover in enumerate(covers) for i in range(len(cover))]
        joined_roots: list[Node] = []
        self._root_joins = [self._push(joined_roots, root) for cover in covers for root in cover]

    @staticmethod
    def of(config: Config, ranks: int, rank: int) -> LeafTree:
        """Return the tree of a run, whose micro-batches are its leaves."""
        train = config.train
        assert train.micro_batch_size is not None
        return LeafTree(train.batch_size // train.micro_batch_size, ranks, rank)

    def _push(self, stack: list[Node], node: Node) -> int:
        """Put ``node``, which follows all nodes in the stack, on top; return with how many it has been joined."""
        joined = 0
        while True:
            level, index = node
            if index % 2:
                if not stack or stack[-1] != (level, index - 1):
                    break  # another rank has the left half
                stack.pop()
                joined += 1
            elif index == 0 or (index + 1) << level < self.leaves:
                break  # its right half is to come, or it is the whole
            node = (level + 1, index // 2)
        stack.append(node)
        return joined

    def total(self, roots: Iterable[T], add: Callable[[T, T], T]) -> T:
        """Return the sum of all leaves from the roots of all ranks, in the order of the leaves."""
        stack: list[T] = []
        for joined, value in zip(self._root_joins, roots, strict=True):
            for _ in range(joined):
                value = add(stack.pop(), value)
            stack.append(value)
        (total,) = stack
        return total


def sum_of_leaves(values: Any, leaves: int, add: Callable[[Any, Any], Any]) -> Any:
    """Return ``[1, n]``, the sum of ``values`` ``[leaves, n]`` in the tree's order, level by level."""
    if leaves == 1:
        return values
    half = 1 << ((leaves - 1).bit_length() - 1)  # the leaves of the root's left half
    if leaves == 2 * half:
        return sum_of_leaves(add(values[0::2], values[1::2]), half, add)
    return add(sum_of_leaves(values[:half], half, add), sum_of_leaves(values[half:leaves], leaves - half, add))
