"""A pipeline stage at work in TensorFlow: executes a schedule, and passes activations and their gradients on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tensorflow as tf

from hvdlm.parallel.axis_groups import Axes
from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm.parallel.stage_runner import PipelineStage
from hvdlm.protocols.types import Batch

Compute = Callable[[int, Batch, "tf.Tensor | None"], tf.Tensor]
"""(number, micro-batch, what the stage before made of it) -> what this stage makes of it; the last one's: a scalar."""
Apply = Callable[[tf.Tensor], None]


class Pipeline(PipelineStage):
    """One stage, whose activations are of ``dtype``."""

    def __init__(self, model_shard: ModelShard, axes: Axes, schedule: str, rank: int, dtype: tf.DType) -> None:
        super().__init__(model_shard, axes, schedule, rank)
        self._dtype = dtype

    def run(
        self, micro_batches: Sequence[Batch], width: int, parameters: tf.Variable, compute: Compute, apply: Apply
    ) -> None:
        """Do all passes of a step; ``apply`` is given the gradient ``[size]`` of each micro-batch."""
        kept: dict[int, tuple[tf.GradientTape, tf.Tensor | None, tf.Tensor]] = {}
        for action, received in self.passes(micro_batches, width):
            n = action.micro_batch
            if action.kind == "forward":
                with tf.GradientTape(watch_accessed_variables=False) as tape:
                    tape.watch(parameters)
                    if received is not None:
                        tape.watch(received)
                    made = compute(n, micro_batches[n], received)
                kept[n] = (tape, received, made)
                if not self._stage.last:
                    self.pass_on(action, made)
            else:
                tape, x, made = kept.pop(n)
                sources = [parameters] if x is None else [parameters, x]
                gradient, *passed = tape.gradient(made, sources, output_gradients=received)
                apply(tf.convert_to_tensor(gradient))
                if x is not None:
                    self.pass_on(action, passed[0])

    def empty(self, shape: tuple[int, ...]) -> tf.Tensor:
        """Return a tensor that can be received into."""
        return tf.zeros(shape, self._dtype)

    def packed(self, tensor: tf.Tensor) -> tf.Tensor:
        """Return ``tensor`` as Horovod takes it: bfloat16 travels as the integers of its bits."""
        return tf.bitcast(tensor, tf.int16) if tensor.dtype == tf.bfloat16 else tensor

    def unpacked(self, tensor: tf.Tensor) -> tf.Tensor:
        """Return what has travelled as it is computed with."""
        return tf.bitcast(tensor, self._dtype) if tensor.dtype != self._dtype else tensor
