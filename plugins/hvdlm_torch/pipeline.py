"""A pipeline stage at work: executes a schedule, and passes activations and their gradients on.

They travel by a broadcast among the two ranks: sent in the background, and asked for one action before they are
needed, so that they travel while both compute.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from hvdlm.interfaces import Batch, Group, Handle
from hvdlm_sharding.axes import Axes
from hvdlm_sharding.rules import Share
from hvdlm_sharding.schedules import Action, make_schedule

Compute = Callable[[int, Batch, torch.Tensor | None], torch.Tensor]
"""(number, micro-batch, what the stage before made of it) -> what this stage makes of it; the last one's: a scalar."""


class Pipeline:
    """One stage. ``waited``: the seconds that it stood still for other stages in this step."""

    def __init__(self, share: Share, axes: Axes, schedule: str, rank: int, device: torch.device) -> None:
        self._stage, self._share, self._axes, self._schedule = share.stage, share, axes, schedule
        self._rank, self._device = rank, device
        self._sent: list[Handle] = []
        self.waited = 0.0

    def run(
        self, micro_batches: Sequence[Batch], width: int, compute: Compute, before_backward: Callable[[bool], None]
    ) -> None:
        """Do all passes of a step; ``before_backward`` is told whether a backward pass is the last."""
        self.waited, count = 0.0, len(micro_batches)
        actions = make_schedule(self._schedule, self._stage.number, self._stage.count, count)
        kept: dict[int, tuple[torch.Tensor | None, torch.Tensor]] = {}
        awaited = self._ask(actions[0], micro_batches, width)
        for place, action in enumerate(actions):
            received = self._wait(awaited)
            awaited = self._ask(actions[place + 1], micro_batches, width) if place + 1 < len(actions) else None
            n = action.micro_batch
            if action.kind == "forward":
                x = None if received is None else received.requires_grad_()
                kept[n] = (x, compute(n, micro_batches[n], x))
                if not self._stage.last:
                    self._send(self._axes.after, kept[n][1].detach(), f"pipeline.forward.{n}")
            else:
                x, y = kept.pop(n)
                before_backward(n + 1 == count)
                torch.autograd.backward(y, received)
                if x is not None:
                    self._send(self._axes.before, x.grad, f"pipeline.backward.{n}")
        self.flush()

    def relay(self, shape: tuple[int, ...], compute: Callable[[torch.Tensor | None], torch.Tensor]) -> torch.Tensor:
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
        return self._receive(
            self._axes.before if forward else self._axes.after, shape, f"pipeline.{'.'.join(map(str, action))}"
        )

    def _receive(self, group: Group | None, shape: tuple[int, ...], name: str) -> Handle:
        assert group is not None
        root = 1 - group.ranks.index(self._rank)
        return group.broadcast_async(torch.empty(shape, device=self._device), root, name)

    def _send(self, group: Group | None, tensor: torch.Tensor | None, name: str) -> None:
        assert group is not None and tensor is not None
        self._sent.append(group.broadcast_async(tensor.contiguous(), group.ranks.index(self._rank), name))

    def _wait(self, handle: Handle | None) -> torch.Tensor | None:
        if handle is None:
            return None
        started = time.perf_counter()
        tensor = handle.wait()
        self.waited += time.perf_counter() - started
        return tensor
