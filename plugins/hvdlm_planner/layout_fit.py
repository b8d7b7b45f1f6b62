"""How ranks that communicate slow each other down: fitted to steps of small models in several layouts.

Isolated collectives say how long a message takes; a step shows what it costs beside computation: how much of it is
hidden, what ranks wait because they don't arrive at once, and what compressors compute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hvdlm.planning.gradient_work import work_of
from hvdlm.planning.hardware import OUTER_UPDATE, CompressorRate, Hardware, MeasuredCollective, Rates
from hvdlm.planning.rates import Computation, Network
from hvdlm.planning.step_time import step_time
from hvdlm.planning.work import Work
from hvdlm_planner.timed_steps import TimedModel, median

_SLOWDOWNS = (1.0, 1.15, 1.3, 1.5, 1.75, 2.0, 2.5, 3.5, 6.0, 20.0)
_FACTORS = tuple(1.2**power for power in range(-8, 13))  # on the seconds of isolated collectives: 0.23 to 8.9


@dataclass(frozen=True)
class Layout:
    """A timed model of one kind: data, blocking (tensor, pipeline), outer_update, or a compressor."""

    kind: str
    model: TimedModel


def fit_layouts(
    layouts: Sequence[Layout], hardware: Hardware, rates: Rates
) -> tuple[Rates, tuple[MeasuredCollective, ...]]:
    """Return the rates with what communication costs them, and the collectives' seconds as steps show them.

    ``hardware`` has the isolated collectives; ``rates`` are those of ranks that compute by themselves.
    """
    data = [_Case(layout.model) for layout in layouts if layout.kind == "data"]
    blocking = [_Case(layout.model) for layout in layouts if layout.kind == "blocking"]

    def scaled(factor: float) -> tuple[MeasuredCollective, ...]:
        return tuple(replace(c, seconds=tuple(factor * s for s in c.seconds)) for c in hardware.collectives)

    def machine(rates: Rates, collectives: tuple[MeasuredCollective, ...]) -> Hardware:
        return replace(hardware, rates=(rates,), collectives=collectives)

    def error_of_data(choice: tuple[float, float]) -> float:
        slowdown, factor = choice
        return _error(data, machine(replace(rates, overlap_slowdown=slowdown), scaled(factor)))

    slowdown, factor = _best(((s, f) for f in _FACTORS for s in _SLOWDOWNS), error_of_data)
    rates, collectives = replace(rates, overlap_slowdown=slowdown), scaled(factor)
    latency = max(1e-5, hardware.links["node"].latency_seconds)

    def error_of_blocking(choice: tuple[float, float]) -> float:
        factor, seconds = choice
        changed = replace(rates, blocking_factor=factor, blocking_seconds=seconds)
        return _error(blocking, machine(changed, collectives))

    if blocking:
        waits = [0.0, *(latency * 1.3**power for power in range(-8, 16))]
        factor, seconds = _best(((f, s) for s in waits for f in _FACTORS), error_of_blocking)
        rates = replace(rates, blocking_factor=factor, blocking_seconds=seconds)
    compressors = dict(_compressors(layouts, machine(rates, collectives)))
    return replace(rates, compressors=compressors), collectives


def _compressors(layouts: Sequence[Layout], hardware: Hardware) -> Iterable[tuple[str, CompressorRate]]:
    """Yield the seconds of an element for each compressor, and for the outer update of local SGD and DiLoCo."""
    rates = hardware.rates[0]
    for kind in dict.fromkeys(layout.kind for layout in layouts if layout.kind not in ("data", "blocking")):
        without = replace(hardware, rates=(replace(rates, compressors={kind: CompressorRate(0.0)}),))
        seconds = []
        for layout in layouts:
            if layout.kind == kind:
                case = _Case(layout.model)
                seconds.append(max(0.0, case.measured - case.predicted(without)) / _elements(case.works[0], kind))
        yield kind, CompressorRate(sum(seconds) / len(seconds))


def _elements(work: Work, kind: str) -> float:
    """Return the elements that a step compresses, or the share of a round's update that falls on it."""
    if kind == OUTER_UPDATE:
        return work.rounds_bytes / 12
    return sum(bucket.compressed for bucket in work.buckets)


class _Case:
    """A measured step, and its prediction."""

    def __init__(self, model: TimedModel) -> None:
        self.measured = median(model)
        self._config, self._mesh = model.config, model.mesh
        stages = range(model.mesh.pipeline)
        works = [work_of(model.config, model.spec, model.mesh, stage * model.mesh.tensor) for stage in stages]
        self.works = [work for work in works if work is not None]

    def predicted(self, hardware: Hardware) -> float:
        """Return the seconds of the step on ``hardware``."""
        config, per_node = self._config, min(hardware.ranks_per_node, self._mesh.size)
        computation = Computation(hardware, config.framework, config.train.precision, per_node)
        network = Network(hardware, self._mesh, config.framework)
        return step_time(self.works, config.parallel.schedule, computation, network).seconds


def _error(cases: Sequence[_Case], hardware: Hardware) -> float:
    """Return the sum of the squared logarithms of predicted / measured seconds."""
    return sum(math.log(case.predicted(hardware) / case.measured) ** 2 for case in cases)


def _best(candidates: Iterable[Any], error: Callable[[Any], float]) -> Any:
    return min(candidates, key=error)
