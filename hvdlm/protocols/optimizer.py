"""Optimizers and learning-rate schedules of plugins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from hvdlm.protocols.types import Tensor

if TYPE_CHECKING:
    from hvdlm.config import TrainConfig


class Optimizer(Protocol):
    """An update rule on flat float32 vectors, written once for every framework with ``keras.ops``.

    A rank may hold a shard of the parameters (ZeRO, tensor parallelism), so every element's update depends on this
    element alone. Gradients are clipped before, and weight decay is applied by the framework.

    Attributes:
        state: the names of its state vectors, ``optimizer/NAME/...`` in checkpoints; they begin as zeros.
        decoupled: whether weight decay is subtracted from the parameters, as in AdamW; else it is added to the
            gradient.
    """

    state: tuple[str, ...]
    decoupled: bool

    def update(
        self, parameters: Tensor, gradient: Tensor, state: Mapping[str, Tensor], learning_rate: Tensor, step: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the new parameters and the new state, all float32 ``[size]``; the arguments stay as they are.

        ``learning_rate`` and ``step`` (from 0) are float32 scalars. TensorFlow calls it in a graph, once for all steps.
        """


OptimizerMaker = Callable[["TrainConfig"], Optimizer]
"""``config.train`` -> Optimizer."""

ScheduleMaker = Callable[["TrainConfig"], Callable[[int], float]]
"""``config.train`` -> rate(updates done): the learning rate of the next update, after the linear warm-up."""
