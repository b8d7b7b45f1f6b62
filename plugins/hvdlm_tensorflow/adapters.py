"""The weights of a model of which perhaps only low-rank adapters are trained: the equations of ``hvdlm.models.lora``.

An adapted weight, the sum of the frozen weight and its adapter, is a variable that is computed once per step. The
gradients of the adapter's two matrices are derived from its gradient. The models' code is the same with and without
adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from hvdlm.models.spec import Adapter
from hvdlm.parallel.sharded_state import ShardedState


class Adapters:
    """The weights that a model computes with, from the trained parameters: the same where nothing is frozen.

    Attributes:
        leaves: the names of the weights whose gradients the backward pass computes.
    """

    def __init__(self, state: ShardedState, flat: tf.Variable) -> None:
        self._flat = flat
        self._layout = state.layout
        self._frozen = {name: tf.constant(array) for name, array in state.initial_frozen()}
        self._weights = [
            _AdaptedWeight(
                adapter, self._frozen[adapter.weight], tf.Variable(self._frozen[adapter.weight], trainable=False)
            )
            for adapter in state.spec.adapters
        ]
        self._slots = [slot.name for slot in self._layout.slots]
        self.leaves = [weight.names.weight for weight in self._weights] or self._slots
        self.add()

    def bound(self) -> Mapping[str, tf.Tensor]:
        """Return the weights by name."""
        if not self._frozen:
            return self._trained()
        # Named here, and not where a model first reads them: what a graph keeps of its forward pass is counted.
        frozen = {name: tf.identity(tensor) for name, tensor in self._frozen.items()}
        return frozen | {weight.names.weight: weight.variable.read_value() for weight in self._weights}

    def gradients(self, of_leaves: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Return the flat gradients of the trained parameters in the layout's order, from those of the leaves."""
        if not self._weights:
            return list(of_leaves)
        trained = self._trained()
        gradients: dict[str, tf.Tensor] = {}
        for weight, gradient in zip(self._weights, of_leaves, strict=True):
            gradients |= weight.derive_gradients(gradient, trained[weight.names.down], trained[weight.names.up])
        return [gradients[name] for name in self._slots]

    def add(self) -> None:
        """Recompute the adapted weights, after the adapters have changed."""
        trained = self._trained() if self._weights else {}
        for weight in self._weights:
            weight.add(trained[weight.names.down], trained[weight.names.up])

    def frozen_arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the name, ``frozen/NAME``, and the present values of every frozen weight."""
        return ((f"frozen/{name}", tensor.numpy()) for name, tensor in self._frozen.items())

    def _trained(self) -> dict[str, tf.Tensor]:
        """Return every trained parameter as a slice of the flat vector."""
        slots, lengths, end = self._layout.slots, [], 0
        for slot in slots:
            lengths += [slot.start - end, slot.stop - slot.start]  # between buckets there may be zeros
            end = slot.stop
        gaps_and_slots = tf.split(self._flat, [*lengths, self._layout.size - end])
        slices = gaps_and_slots[1::2]
        return {slot.name: tf.reshape(values, slot.shape) for slot, values in zip(slots, slices, strict=True)}


@dataclass
class _AdaptedWeight:
    """An adapted weight: ``variable`` holds ``frozen + factor * down @ up``."""

    names: Adapter
    frozen: tf.Tensor
    variable: tf.Variable

    def add(self, down: tf.Tensor, up: tf.Tensor) -> None:
        """Recompute the sum."""
        product = down @ _matrix(up)
        self.variable.assign(self.frozen + self.names.factor * tf.reshape(product, self.frozen.shape))

    def derive_gradients(self, gradient: tf.Tensor, down: tf.Tensor, up: tf.Tensor) -> dict[str, tf.Tensor]:
        """Return the flat gradients of ``down`` and ``up`` from that of the sum, G: G up^T and down^T G."""
        gradient = self.names.factor * tf.reshape(gradient, [down.shape[0], -1])
        gradients = {
            self.names.down: tf.matmul(gradient, _matrix(up), transpose_b=True),
            self.names.up: tf.matmul(down, gradient, transpose_a=True),
        }
        return {name: tf.reshape(matrix, [-1]) for name, matrix in gradients.items()}


def _matrix(up: tf.Tensor) -> tf.Tensor:
    """Return ``up`` ``[rank, outputs]``; of a recurrent layer it is ``[rank, gates, hidden]``."""
    return tf.reshape(up, [up.shape[0], -1])
