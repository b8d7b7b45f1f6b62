"""A pipeline stage at work: executes a schedule, and passes activations and their gradients on.

They travel by a broadcast among the two ranks: sent in the background, and asked for one action before they are
needed, so that they travel while both compute.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import tensorflow as tf

from hvdlm.interfaces import Batch, Group, Handle
from hvdlm_sharding.axes import Axes
from hvdlm_sharding.rules import Share
from hvdlm_sharding.schedules import Action, make_schedule

Compute = Callable[[int, Batch, "tf.Tensor | None"], tf.Tensor]
"""(number, micro-batch, what the stage before made of it) -> what this stage makes of it; the last one's: a scalar."""
Apply = Callable[[tf.Tensor], None]


class Pipeline:
    """One stage. ``waited``: the seconds that it stood still for other stages in this step."""

    def __init__(self, share: Share, axes: Axes, schedule: str, rank: int, dtype: tf.DType) -> None:
        self._stage, self._share, self._axes, self._schedule = share.stage, share, axes, schedule
        self._rank, self._dtype = rank, dtype
        self._sent: list[Handle] = []
        self.waited = 0.0

    def run(
        self, micro_batches: Sequence[Batch], width: int, parameters: tf.Variable, compute: Compute, apply: Apply
    ) -> None:
        """Do all passes of a step; ``apply`` is given the gradient ``[size]`` of each micro-batch."""
        self.waited, count = 0.0, len(micro_batches)
        actions = make_schedule(self._schedule, self._stage.number, self._stage.count, count)
        kept: dict[int, tuple[tf.GradientTape, tf.Tensor | None, tf.Tensor]] = {}
        awaited = self._ask(actions[0], micro_batches, width)
        for place, action in enumerate(actions):
            received = self._wait(awaited)
            awaited = self._ask(actions[place + 1], micro_batches, width) if place + 1 < len(actions) else None
            n = action.micro_batch
            if action.kind == "forward":
                with tf.GradientTape(watch_accessed_variables=False) as tape:
                    tape.watch(parameters)
                    if received is not None:
                        tape.watch(received)
                    made = compute(n, micro_batches[n], received)
                kept[n] = (tape, received, made)
                if not self._stage.last:
                    self._send(self._axes.after, made, f"pipeline.forward.{n}")
            else:
                tape, x, made = kept.pop(n)
                sources = [parameters] if x is None else [parameters, x]
                gradient, *passed = tape.gradient(made, sources, output_gradients=received)
                apply(tf.convert_to_tensor(gradient))
                if x is not None:
                    self._send(self._axes.before, passed[0], f"pipeline.backward.{n}")
        self.flush()

    def relay(self, shape: tuple[int, ...], compute: Callable[[tf.Tensor | None], tf.Tensor]) -> tf.Tensor:
        """Do one forward pass: take ``shape`` from the stage before, compute, pass it on; return what was computed."""
        received = None if self._stage.first else self._wait(self._receive(self._axes.before, shape, "pipeline.pass"))
        made = compute(received)
        if not self._stage.last:
            self._send(self._axes.after, made, "pipeline.pass")
            self.flush()
        return made

    def shape(self, batch: Batch, width: int) -> tuple[int, ...]:
        """Return the shape of what stages pass on: of the positions perhaps only this tensor rank's."""
        rows, positions = batch.inputs.shape
        shared = self._share.sequence and positions % self._share.tensor == 0
        return (rows, positions // self._share.tensor if shared else positions, width)

    def flush(self) -> None:
        """Wait until all has been sent."""
        for handle in self._sent:
            handle.wait()
        self._sent.clear()

    def _ask(self, action: Action, micro_batches: Sequence[Batch], width: int) -> Handle | None:
        """Begin to receive what ``action`` needs."""
        forward = action.kind == "forward"
        if self._stage.first if forward else self._stage.last:
            return None
        shape = self.shape(micro_batches[action.micro_batch], width)
        group = self._axes.before if forward else self._axes.after
        return self._receive(group, shape, f"pipeline.{action.kind}.{action.micro_batch}")

    def _receive(self, group: Group | None, shape: tuple[int, ...], name: str) -> Handle:
        assert group is not None
        empty = self._packed(tf.zeros(shape, self._dtype))
        return group.broadcast_async(empty, 1 - group.ranks.index(self._rank), name)

    def _send(self, group: Group | None, tensor: tf.Tensor, name: str) -> None:
        assert group is not None
        self._sent.append(group.broadcast_async(self._packed(tensor), group.ranks.index(self._rank), name))

    def _packed(self, tensor: tf.Tensor) -> tf.Tensor:
        """Return ``tensor`` as Horovod takes it: bfloat16 travels as the integers of its bits."""
        return tf.bitcast(tensor, tf.int16) if tensor.dtype == tf.bfloat16 else tensor

    def _wait(self, handle: Handle | None) -> tf.Tensor | None:
        if handle is None:
            return None
        started = time.perf_counter()
        tensor = handle.wait()
        self.waited += time.perf_counter() - started
        return tf.bitcast(tensor, self._dtype) if tensor.dtype != self._dtype else tensor
