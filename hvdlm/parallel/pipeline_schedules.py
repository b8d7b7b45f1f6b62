"""Pipeline schedules: the order in which a stage computes, as a list of actions that every framework executes.

GPipe (Huang et al. 2019): all forward passes, then all backward passes. One-forward-one-backward (Narayanan et al.
2019 and 2021, section 2.2): after a warm-up, forward and backward passes alternate, so that a stage keeps the
activations of at most ``stages - stage`` micro-batches instead of all. Both have the same bubble.
"""

from __future__ import annotations

from typing import NamedTuple


class Action(NamedTuple):
    """One pass of one micro-batch; ``kind`` is forward or backward."""

    kind: str
    micro_batch: int


def make_pipeline_schedule(name: str, stage: int, stages: int, micro_batches: int) -> list[Action]:
    """Return the actions of ``stage`` of ``stages``; ``name`` is gpipe or 1f1b.

    Before a forward pass, a stage but the first receives activations; after it, a stage but the last sends them.
    Before a backward pass, a stage but the last receives their gradient; after it, a stage but the first sends it.
    """
    forward = [Action("forward", i) for i in range(micro_batches)]
    backward = [Action("backward", i) for i in range(micro_batches)]
    if name == "gpipe":
        return forward + backward
    ahead = min(stages - stage - 1, micro_batches)
    steady = [action for pair in zip(forward[ahead:], backward, strict=False) for action in pair]
    return forward[:ahead] + steady + backward[micro_batches - ahead :]
