"""What stages and tensor ranks have in common in all frameworks: who talks to whom, when, and about how much.

A stage's activations and gradients travel by a broadcast among two ranks: sent in the background, and asked for one
action before they are needed, so that they travel while both compute.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from hvdlm.parallel.axis_groups import Axes
from hvdlm.parallel.pipeline_schedules import Action, make_pipeline_schedule
from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm.protocols.group import Group, Handle
from hvdlm.protocols.types import Batch, Tensor

Ranks = TypeVar("Ranks", bound="TensorRanks")


class PipelineStage:
    """One stage. ``waited``: the seconds that it stood still for other stages in this step."""

    def __init__(self, model_shard: ModelShard, axes: Axes, schedule: str, rank: int) -> None:
        self._stage, self._model_shard, self._axes, self._schedule = model_shard.stage, model_shard, axes, schedule
        self._rank = rank
        self._sent: list[Handle] = []
        self.waited = 0.0

    def passes(self, micro_batches: Sequence[Batch], width: int) -> Iterator[tuple[Action, Tensor | None]]:
        """Yield the actions of a step, each with what another stage has sent for it; at last all has been sent."""
        self.waited = 0.0
        actions = make_pipeline_schedule(self._schedule, self._stage.number, self._stage.count, len(micro_batches))
        awaited = self._ask(actions[0], micro_batches, width)
        for place, action in enumerate(actions):
            received = self._wait(awaited)
            awaited = self._ask(actions[place + 1], micro_batches, width) if place + 1 < len(actions) else None
            yield action, received
        self.flush()

    def pass_on(self, action: Action, made: Tensor) -> None:
        """Send what an action has made to the stage that waits for it: activations onwards, a gradient back."""
        group = self._axes.after if action.kind == "forward" else self._axes.before
        self._send(group, made, f"pipeline.{action.kind}.{action.micro_batch}")

    def relay(self, shape: tuple[int, ...], compute: Callable[[Tensor | None], Tensor]) -> Tensor:
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
        shared = self._model_shard.sequence and positions % self._model_shard.tensor == 0
        return (rows, positions // self._model_shard.tensor if shared else positions, width)

    def flush(self) -> None:
        """Wait until all has been sent."""
        for handle in self._sent:
            handle.wait()
        self._sent.clear()

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor that can be received into."""
        raise NotImplementedError

    def packed(self, tensor: Tensor) -> Tensor:
        """Return ``tensor`` as it travels."""
        raise NotImplementedError

    def unpacked(self, tensor: Tensor) -> Tensor:
        """Return what has travelled as it is computed with."""
        raise NotImplementedError

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
        return group.broadcast_async(self.packed(self.empty(shape)), 1 - group.ranks.index(self._rank), name)

    def _send(self, group: Group | None, tensor: Tensor, name: str) -> None:
        assert group is not None
        self._sent.append(group.broadcast_async(self.packed(tensor), group.ranks.index(self._rank), name))

    def _wait(self, handle: Handle | None) -> Tensor | None:
        if handle is None:
            return None
        started = time.perf_counter()
        tensor = handle.wait()
        self.waited += time.perf_counter() - started
        return self.unpacked(tensor)


class TensorRanks:
    """A rank's tensor group; all its ranks call the same collectives in the same order.

    ``sequence``: whether, outside of the layers' matrix products, a rank has only its part of the positions.
    """

    def __init__(self, group: Group, model_shard: ModelShard, sequence: bool | None = None) -> None:
        self.group, self.model_shard = group, model_shard
        self.size, self.place = model_shard.tensor, model_shard.place
        self.sequence = model_shard.sequence if sequence is None else sequence
        self._whole: Any = type(self)(group, model_shard, False) if self.sequence else self

    def over(self: Ranks, time: int) -> Ranks:
        """Return the collectives for ``time`` positions: they are shared only where they divide."""
        whole: Ranks = self._whole
        return whole if time % self.size else self

    def alone(self: Ranks) -> Ranks:
        """Return the collectives that share no positions, for generation."""
        whole: Ranks = self._whole
        return whole
