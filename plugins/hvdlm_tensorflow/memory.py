"""What a graph keeps for its backward pass: the tensors of the forward pass that the backward pass reads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import tensorflow as tf


class Kept:
    """Counts while a graph is traced. ``bytes``: the most that any of the graphs keeps; 0: none was traced yet."""

    def __init__(self) -> None:
        self.bytes = 0
        self._forward: set[str] = set()
        self._count = 0

    @contextlib.contextmanager
    def forward(self, parameters: Mapping[str, tf.Tensor]) -> Iterator[None]:
        """Hear that a forward pass over ``parameters``, which don't count, is traced."""
        graph = tf.compat.v1.get_default_graph()
        before = len(graph.get_operations())
        yield
        operations = graph.get_operations()
        self._forward = {op.name for op in operations[before:]}
        self._count = len(operations)

    def backward(self) -> None:
        """Hear that the backward pass has been traced."""
        graph = tf.compat.v1.get_default_graph()
        kept = {}
        for operation in graph.get_operations()[self._count :]:
            for tensor in operation.inputs:
                constant = tensor.op.type in ("Const", "Shape", "ReadVariableOp")
                if tensor.op.name in self._forward and not constant and tensor.shape.is_fully_defined():
                    kept[tensor.name] = tensor.shape.num_elements() * tensor.dtype.size
        self.bytes = max(self.bytes, sum(kept.values()))
