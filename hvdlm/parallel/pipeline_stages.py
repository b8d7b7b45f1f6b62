"""Pipeline stages: consecutive layers, divided so that the slowest stage is as fast as possible."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from hvdlm.models.spec import ModelSpec


@dataclass(frozen=True)
class Stage:
    """One stage: layers of the model; before those of the first stage the embedding, after those of the last the head.

    ``chunks``: (first, last exclusive) of its consecutive layers: one range, or one of every virtual stage.
    """

    number: int
    count: int
    chunks: tuple[tuple[int, int], ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """The indices of its layers."""
        return tuple(index for chunk in self.chunks for index in range(*chunk))

    @property
    def first(self) -> bool:
        """Whether it embeds the tokens."""
        return self.number == 0

    @property
    def last(self) -> bool:
        """Whether it computes the loss."""
        return self.number == self.count - 1

    def holds(self, name: str) -> bool:
        """Return whether the parameter ``name`` belongs to this stage."""
        kind, _, rest = name.partition(".")
        if kind == "embed":
            return self.first
        if kind == "layers":
            index = int(rest.partition(".")[0])
            return any(first <= index < last for first, last in self.chunks)
        return self.last


def layer_flops(spec: ModelSpec) -> tuple[list[float], float]:
    """Return the cost of every layer and of the head, in FLOPs per token and step."""
    s = spec.settings
    costs = [0.0] * s.layers
    for param in spec.params:
        kind, _, rest = param.name.partition(".")
        if kind == "layers" and len(param.shape) > 1:
            costs[int(rest.partition(".")[0])] += 6.0 * param.size
    attention = getattr(s, "attention_flops", 0.0)
    return [cost + attention for cost in costs], 6.0 * s.vocab * s.width


def cut_into_stages(spec: ModelSpec, stages: int) -> list[Stage]:
    """Divide the layers so that the most expensive of ``stages`` stages is cheapest; of equals, stages end early.

    Raises:
        ValueError: fewer layers than stages.
    """
    costs, head = layer_flops(spec)
    layers = len(costs)
    if layers < stages:
        raise ValueError(f"{layers} layers are fewer than {stages} stages")

    @cache
    def best(first: int, left: int) -> tuple[float, tuple[int, ...]]:
        """Return (cost of the slowest, ends) for layers ``first`` onwards in ``left`` stages."""
        if left == 1:
            return sum(costs[first:]) + head, (layers,)
        best_cut: tuple[float, tuple[int, ...]] = (math.inf, ())
        for end in range(first + 1, layers - left + 2):
            slowest, ends = best(end, left - 1)
            slowest = max(slowest, sum(costs[first:end]))
            if slowest < best_cut[0]:
                best_cut = (slowest, (end, *ends))
        return best_cut

    ends = best(0, stages)[1]
    starts = (0, *ends[:-1])
    return [Stage(i, stages, ((a, b),)) for i, (a, b) in enumerate(zip(starts, ends, strict=True))]


def stage_of_rank(stages: list[Stage], pipeline: int, index: int) -> Stage:
    """Return what rank ``index`` of ``pipeline`` holds of the (virtual) ``stages``: every ``pipeline``-th of them."""
    return Stage(index, pipeline, tuple(chunk for stage in stages[index::pipeline] for chunk in stage.chunks))
