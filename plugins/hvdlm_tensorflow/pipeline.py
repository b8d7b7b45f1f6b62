"""A pipeline stage in TensorFlow: follows a schedule of passes, and sends activations and their gradients on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tensorflow as tf

from hvdlm.parallel.pipeline_schedules import Action
from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm.protocols.types import Batch
from hvdlm_language.axis_groups import Axes
from hvdlm_language.stage_runner import PipelineStage

Compute = Callable[[Action, Batch, "tf.Tensor | None"], tf.Tensor]
"""(action, micro-batch, the stage before's activations) -> this stage's activations; in the last stage, the loss."""


class Pipeline(PipelineStage):
    """The passes of one stage, whose activations are of ``dtype``."""

    def __init__(self, model_shard: ModelShard, axes: Axes, schedule: str, rank: int, dtype: tf.DType) -> None:
        super().__init__(model_shard, axes, schedule, rank)
        self._dtype = dtype

    def run(
        self,
        micro_batches: Sequence[Batch],
        width: int,
        parameters: tf.Variable,
        compute: Compute,
        add: Callable[[tf.Tensor], None],
    ) -> None:
        """Do all passes of a step; ``add`` is called with the gradient ``[size]`` of each micro-batch."""
        # Of forward passes whose backward pass is still to come: the tape, the input, the output.
        tapes: dict[tuple[int, int], tuple[tf.GradientTape, tf.Tensor | None, tf.Tensor]] = {}
        for action, received in self.passes(micro_batches, width):
            number, key = action.micro_batch, (action.chunk, action.micro_batch)
            if action.kind == "forward":
                with tf.GradientTape(watch_accessed_variables=False) as tape:
                    tape.watch(parameters)
                    if received is not None:
                        tape.watch(received)
                    y = compute(action, micro_batches[number], received)
                tapes[key] = (tape, received, y)
                if not self._chunks[action.chunk].last:
                    self.pass_on(action, y)
            else:
                tape, x, y = tapes.pop(key)
                sources = [parameters] if x is None else [parameters, x]
                # received: the gradient of y; None where y is the loss.
                gradient, *of_x = tape.gradient(y, sources, output_gradients=received)
                if x is not None:  # first: with ZeRO-2, adding waits for sums, and the stage before for this
                    self.pass_on(action, of_x[0])
                add(tf.convert_to_tensor(gradient))

    def empty(self, shape: tuple[int, ...]) -> tf.Tensor:
        """Return a tensor to receive into."""
        return tf.zeros(shape, self._dtype)

    def packed(self, tensor: tf.Tensor) -> tf.Tensor:
        """Return ``tensor`` in the form in which it is sent."""
        return tensor

    def unpacked(self, tensor: tf.Tensor) -> tf.Tensor:
        """Return a received tensor in the form in which it is computed with."""
        return tensor
