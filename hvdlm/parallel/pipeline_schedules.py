"""Pipeline schedules: the order in which a stage computes, as a list of actions that every framework executes.

GPipe (Huang et al. 2019): all forward passes, then all backward passes. One-forward-one-backward (Narayanan et al.
2019 and 2021, section 2.2): after a warm-up, forward and backward passes alternate, so that a stage keeps the
activations of at most ``stages - stage`` micro-batches instead of all. Both have the same bubble. Interleaved 1F1B
(Narayanan et al. 2021, section 2.2) cuts the model into ``virtual`` times as many virtual stages, of which a rank
computes every ``stages``-th: its chunks. The bubble is ``virtual`` times as short.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Action(NamedTuple):
    """One pass of one micro-batch; ``kind`` is forward or backward, ``chunk`` the rank's virtual stage."""

    kind: str
    micro_batch: int
    chunk: int = 0


def make_pipeline_schedule(name: str, stage: int, stages: int, micro_batches: int, virtual: int = 1) -> list[Action]:
    """Return the actions of ``stage`` of ``stages``; ``name`` is gpipe or 1f1b.

    Before a forward pass, a stage but the first receives activations; after it, a stage but the last sends them.
    Before a backward pass, a stage but the last receives their gradient; after it, a stage but the first sends it.
    ``virtual``: virtual stages of every rank, with 1f1b and a multiple of ``stages`` micro-batches.
    """
    if virtual > 1:
        return _interleaved(stage, stages, micro_batches, virtual)
    forward = [Action("forward", i) for i in range(micro_batches)]
    backward = [Action("backward", i) for i in range(micro_batches)]
    if name == "gpipe":
        return forward + backward
    return _alternating(forward, backward, stages - stage - 1)


def source_of(action: Action, stage: int, stages: int, virtual: int = 1) -> tuple[int, Action] | None:
    """Return the stage and the action whose result ``action`` of ``stage`` takes; None: it needs no other stage's."""
    step = -1 if action.kind == "forward" else 1
    number = action.chunk * stages + stage + step
    if not 0 <= number < stages * virtual:
        return None
    return number % stages, Action(action.kind, action.micro_batch, number // stages)


def _interleaved(stage: int, stages: int, micro_batches: int, virtual: int) -> list[Action]:
    """Return the actions of all chunks: ``stages`` micro-batches pass the first chunk, then the second, and so on."""
    count, group = micro_batches * virtual, stages * virtual
    units = [(k // group * stages + k % stages, k % group // stages) for k in range(count)]
    forward = [Action("forward", micro_batch, chunk) for micro_batch, chunk in units]
    backward = [Action("backward", micro_batch, virtual - 1 - chunk) for micro_batch, chunk in units]
    return _alternating(forward, backward, 2 * (stages - stage - 1) + (virtual - 1) * stages)


def _alternating(forward: Sequence[Action], backward: Sequence[Action], warm_up: int) -> list[Action]:
    """Return ``warm_up`` forward passes, forward and backward passes in turn, and the remaining backward passes."""
    ahead = min(warm_up, len(forward))
    steady = [action for pair in zip(forward[ahead:], backward, strict=False) for action in pair]
    return [*forward[:ahead], *steady, *backward[len(forward) - ahead :]]
