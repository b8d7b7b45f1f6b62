"""Runs one pipeline stage's schedule, for all frameworks: receives, computes and sends.

Activations and gradients travel between stages as broadcasts among two ranks. Sends run in the background, and a
receive is started one action before its value is needed, so that transfers overlap with computation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from hvdlm.parallel.pipeline_schedules import Action, make_pipeline_schedule
from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm.protocols.group import Group, Handle
from hvdlm.protocols.types import Batch, Tensor
from hvdlm_language.axis_groups import Axes


class PipelineStage:
    """One stage. ``waited``: the seconds for which it waited for other stages in this step."""

    def __init__(self, model_shard: ModelShard, axes: Axes, schedule: str, rank: int) -> None:
        self._stage = model_shard.stage
        self._chunks = [chunk.stage for chunk in model_shard.chunks]
        self._model_shard = model_shard
        self._axes = axes
        self._schedule = schedule
        self._rank = rank
        self._sends: list[Handle] = []
        self.waited = 0.0

    def passes(self, micro_batches: Sequence[Batch], width: int) -> Iterator[tuple[Action, Tensor | None]]:
        """Yield the actions of a step, each with the tensor received for it.

        The last sends are still under way then: ``flush`` waits for them, after the gradients' sums have been started.
        """
        self.waited = 0.0
        stage, count = self._stage, len(micro_batches)
        actions = make_pipeline_schedule(self._schedule, stage.number, stage.count, count, len(self._chunks))
        pending = self._start_receive(actions[0], micro_batches, width)
        for index, action in enumerate(actions):
            received = self._wait(pending)
            # The next action's tensor travels while this action computes.
            pending = (
                self._start_receive(actions[index + 1], micro_batches, width) if index + 1 < len(actions) else None
            )
            yield action, received

    def pass_on(self, action: Action, result: Tensor) -> None:
        """Send an action's result: activations to the next stage, a gradient to the previous one."""
        forward = action.kind == "forward"
        group = self._axes.after if forward else self._axes.before
        self._send(group, result, self._name(f"{action.kind}.{action.micro_batch}", action.chunk, after=forward))

    def relay(self, shape: tuple[int, ...], compute: Callable[[int, Tensor | None], Tensor]) -> Tensor:
        """Do one forward pass without a schedule, chunk after chunk: receive ``shape``, compute, send.

        ``compute``: (chunk, activations of the stage before) -> this stage's.

        Returns:
            the result of the last chunk.
        """
        for chunk, stage in enumerate(self._chunks):
            received = None
            if not stage.first:
                name = self._name("pass", chunk, after=False)
                received = self._wait(self._receive(self._axes.before, shape, name))
            result = compute(chunk, received)
            if not stage.last:
                self._send(self._axes.after, result, self._name("pass", chunk, after=True))
                self.flush()
        return result

    def shape(self, batch: Batch, width: int) -> tuple[int, ...]:
        """Return the shape of the activations that stages exchange: with sharded positions, this rank's shard."""
        rows, positions = batch.inputs.shape
        sharded = self._model_shard.sequence and positions % self._model_shard.tensor == 0
        return (rows, positions // self._model_shard.tensor if sharded else positions, width)

    def flush(self) -> None:
        """Wait until all sends are done."""
        for handle in self._sends:
            handle.wait()
        self._sends.clear()

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor to receive into."""
        raise NotImplementedError

    def packed(self, tensor: Tensor) -> Tensor:
        """Return ``tensor`` in the form in which it is sent."""
        raise NotImplementedError

    def unpacked(self, tensor: Tensor) -> Tensor:
        """Return a received ``tensor`` in the form in which it is computed with."""
        raise NotImplementedError

    def _start_receive(self, action: Action, micro_batches: Sequence[Batch], width: int) -> Handle | None:
        """Start to receive the input of ``action``; None where it needs none from another stage."""
        forward, stage = action.kind == "forward", self._chunks[action.chunk]
        if stage.first if forward else stage.last:
            return None
        shape = self.shape(micro_batches[action.micro_batch], width)
        group = self._axes.before if forward else self._axes.after
        name = self._name(f"{action.kind}.{action.micro_batch}", action.chunk, after=not forward)
        return self._receive(group, shape, name)

    def _name(self, what: str, chunk: int, after: bool) -> str:
        """Return the name of a message between the stage of ``chunk`` and the one after it, or before it.

        Virtual stages have several such pairs on the same two ranks, which the number of the earlier stage
        distinguishes.
        """
        if len(self._chunks) == 1:
            return f"pipeline.{what}"
        return f"pipeline.{what}.{self._chunks[chunk].number - (not after)}"

    def _receive(self, group: Group | None, shape: tuple[int, ...], name: str) -> Handle:
        assert group is not None
        return group.broadcast_async(self.packed(self.empty(shape)), 1 - group.ranks.index(self._rank), name)

    def _send(self, group: Group | None, tensor: Tensor, name: str) -> None:
        assert group is not None
        self._sends.append(group.broadcast_async(self.packed(tensor), group.ranks.index(self._rank), name))

    def _wait(self, handle: Handle | None) -> Tensor | None:
        if handle is None:
            return None
        started = time.perf_counter()
        tensor = handle.wait()
        self.waited += time.perf_counter() - started
        return self.unpacked(tensor)
