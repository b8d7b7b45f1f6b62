"""What a model is bound to where only low-rank adapters are trained: the equations of ``hvdlm.models.lora``.

An adapted weight is a variable of its own, of what it adds up to: summed once per step, and its gradient becomes that
of the two small matrices. Models don't notice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import tensorflow as tf

from hvdlm.models.spec import Adapter
from hvdlm.parallel.sharded_state import ShardedState


@dataclass
class _Sum:
    """An adapted weight: ``frozen + factor * down @ up``, which ``variable`` holds."""

    names: Adapter
    frozen: tf.Tensor
    variable: tf.Variable

    def add(self, down: tf.Tensor, up: tf.Tensor) -> None:
        product = down @ _matrix(up)
        self.variable.assign(self.frozen + self.names.factor * tf.reshape(product, self.frozen.shape))

    def passed_on(self, gradient: tf.Tensor, down: tf.Tensor, up: tf.Tensor) -> dict[str, tf.Tensor]:
        """Return the gradients of ``down`` and ``up``, flat, from that of the sum."""
        gradient = self.names.factor * tf.reshape(gradient, [down.shape[0], -1])
        passed = {self.names.down: tf.matmul(gradient, _matrix(up), transpose_b=True)}
        passed[self.names.up] = tf.matmul(down, gradient, transpose_a=True)
        return {name: tf.reshape(found, [-1]) for name, found in passed.items()}


class Adapters:
    """The weights that a model computes with, from the parameters that are trained: the same where nothing is frozen.

    Attributes:
        leaves: the names of the weights whose gradients the backward pass makes.
    """

    def __init__(self, state: ShardedState, parameters: Mapping[str, tf.Tensor]) -> None:
        self._frozen = {name: tf.constant(array) for name, array in state.frozen()}
        self._slots = [slot.name for slot in state.layout.slots]
        self._sums = [
            _Sum(one, self._frozen[one.weight], tf.Variable(self._frozen[one.weight], trainable=False))
            for one in state.spec.adapters
        ]
        self.leaves = [one.names.weight for one in self._sums] or self._slots
        self.add(parameters)

    def bound(self, parameters: Mapping[str, tf.Tensor]) -> Mapping[str, tf.Tensor]:
        """Return the weights by name."""
        if not self._frozen:
            return parameters
        # Named here, and not where a model first reads them: what a graph keeps of its forward pass is counted.
        found = {name: tf.identity(tensor) for name, tensor in self._frozen.items()}
        return found | {one.names.weight: one.variable.read_value() for one in self._sums}

    def gradients(self, of_leaves: Sequence[tf.Tensor], parameters: Mapping[str, tf.Tensor]) -> list[tf.Tensor]:
        """Return the flat gradients of all parameters in the layout's order, from those of the leaves."""
        if not self._sums:
            return list(of_leaves)
        found: dict[str, tf.Tensor] = {}
        for one, gradient in zip(self._sums, of_leaves, strict=True):
            found |= one.passed_on(gradient, parameters[one.names.down], parameters[one.names.up])
        return [found[name] for name in self._slots]

    def add(self, parameters: Mapping[str, tf.Tensor]) -> None:
        """Add the adapters, which have changed, to what is frozen."""
        for one in self._sums:
            one.add(parameters[one.names.down], parameters[one.names.up])


def _matrix(up: tf.Tensor) -> tf.Tensor:
    return tf.reshape(up, [up.shape[0], -1])
