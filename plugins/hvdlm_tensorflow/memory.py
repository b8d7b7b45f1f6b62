"""The bytes that a graph keeps for its backward pass: tensors of the forward pass that the backward pass reads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tensorflow as tf

from hvdlm_tensorflow.gathered_layers import SCOPE

# Operations whose results are computed again at no cost, or are no activations.
_NOT_KEPT = ("Const", "Shape", "ReadVariableOp")


class ActivationMemory:
    """Counts while graphs are traced. ``bytes``: the most that one of them keeps; 0 before the first trace."""

    def __init__(self) -> None:
        self.bytes = 0
        self._forward: set[str] = set()
        self._end_of_forward = 0

    @contextlib.contextmanager
    def forward(self, parameters: Mapping[str, tf.Tensor]) -> Iterator[None]:
        """Note the operations of the forward pass that is traced inside; ``parameters``, made before, don't count."""
        graph = tf.compat.v1.get_default_graph()
        start = len(graph.get_operations())
        yield
        operations = graph.get_operations()
        self._forward = {op.name for op in operations[start:]}
        self._end_of_forward = len(operations)

    def backward(self) -> None:
        """Count what the backward pass, which has been traced since, reads of the forward pass."""
        graph = tf.compat.v1.get_default_graph()
        kept = {}
        for operation in graph.get_operations()[self._end_of_forward :]:
            for tensor in map(_source, operation.inputs):
                if self._is_kept(tensor):
                    kept[tensor.name] = tensor.shape.num_elements() * tensor.dtype.size
        self.bytes = max(self.bytes, sum(kept.values()))

    def trace(self, parameters: Callable[[], Mapping[str, tf.Tensor]], losses: Callable, arguments: Any) -> None:
        """Count what the passes of ``losses(parameters, arguments)`` keep, in a graph that is traced and never run."""

        def gradients(arguments: Any) -> list[tf.Tensor]:
            weights = parameters()
            with self.forward(weights), tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(weights)
                output, _ = losses(weights, arguments)
            of_weights = tape.gradient(output, list(weights.values()), output_gradients=tf.ones_like(output))
            self.backward()
            # A virtual stage uses some of its rank's parameters: the others have no gradient.
            return [tf.convert_to_tensor(gradient) for gradient in of_weights if gradient is not None]

        tf.function(gradients, autograph=False).get_concrete_function(arguments)

    def _is_kept(self, tensor: tf.Tensor) -> bool:
        operation = tensor.op
        of_forward = operation.name in self._forward and operation.type not in _NOT_KEPT
        of_forward = of_forward and SCOPE not in operation.name  # and no parameter of ZeRO-3
        return of_forward and tensor.shape.is_fully_defined()


def _source(tensor: tf.Tensor) -> tf.Tensor:
    """Return the tensor whose memory ``tensor`` shares: custom gradients are attached to identities."""
    while tensor.op.type in ("Identity", "IdentityN"):
        tensor = tensor.op.inputs[tensor.value_index]
    return tensor
