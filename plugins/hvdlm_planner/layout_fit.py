"""How ranks that communicate slow each other down: fitted to steps of small models in several layouts.

Isolated collectives say how long a message takes; a step shows what it costs beside computation: how much of it is
hidden, what ranks wait because they don't arrive at once, and what compressors compute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hvdlm.planning.gradient_work import work_of
from hvdlm.planning.hardware import OUTER_UPDATE, CompressorRate, Hardware, MeasuredCollective, Rates
from hvdlm.planning.rates import Computation, Network
from hvdlm.planning.step_time import step_time
from hvdlm.planning.work import Work
from hvdlm_planner import fitting
from hvdlm_planner.habits import habits_of
from hvdlm_planner.timed_record import DATA, PIPELINE, TENSOR, ZERO, Timed
from hvdlm_planner.timed_steps import TimedModel, trimmed_mean

_Point = tuple[float, ...]

_SLOWDOWNS = (0.05, 0.3, 1.0, 3.0)  # beyond 1, from which the best one is searched
_FIRST_STEP, _LAST_STEP = 2.0, 1.02  # factors between points of a search

# What is usual, as a median and the standard deviation of the logarithm. Of several constants that explain the timed
# steps equally well, the most probable ones are chosen.
_Usual = tuple[float, float]
_FACTOR: _Usual = (1.0, 0.3)  # on isolated collectives
_SLOWED: _Usual = (0.5, 1.0)  # by which computation and collectives slow each other down
_WAIT: _Usual = (3e-4, 2.0)  # seconds of a collective between tensor ranks, beside its own
_PASS: _Usual = (3e-4, 2.0)  # seconds of a stage's pass, beside its operations
_BUBBLE: _Usual = (0.8, 0.3)  # share of the bubble that a step takes longer
_MOST = {"bubble_factor": 1.0}
_OPERATIONS, _OPERATION = 100, 1e-5  # that a compressor starts for a tensor; seconds of one at least
_ERROR = 0.03  # relative standard deviation of a timed step and of its prediction by the true constants


def fit_layouts(
    layouts: Sequence[Timed], hardware: Hardware, rates: Rates
) -> tuple[Rates, tuple[MeasuredCollective, ...]]:
    """Return the rates with what communication costs them, and the collectives' seconds as steps show them.

    ``hardware`` has the isolated collectives; ``rates`` are those of ranks that compute by themselves.
    """
    fit = _Fit(hardware, rates, layouts)
    for step in (fit.data, fit.zero, fit.tensor, fit.pipeline, fit.compressors):
        step()
    return fit.rates, fit.collectives


class _Fit:
    """The rates as they are fitted kind by kind, each with the constants of those before."""

    def __init__(self, hardware: Hardware, rates: Rates, layouts: Sequence[Timed]) -> None:
        self._hardware = hardware
        self._layouts = layouts
        self.rates = rates
        self.collectives = tuple(hardware.collectives)

    def _cases(self, kind: str) -> list[_Case]:
        return [_Case(timed.model) for timed in self._layouts if timed.kind == kind]

    def _error(self, cases: Sequence[_Case], rates: Rates, collectives: tuple[MeasuredCollective, ...]) -> float:
        """Return the sum of the squared logarithms of predicted / measured seconds, in standard deviations."""
        machine = replace(self._hardware, rates=(rates,), collectives=collectives)
        return sum((math.log(case.predicted(machine) / case.measured) / _ERROR) ** 2 for case in cases)

    def data(self) -> None:
        """Fit how much computation and collectives slow each other down, and how much longer these take in a step."""
        if not (cases := self._cases(DATA)):
            return

        def rates(point: _Point) -> Rates:
            return replace(self.rates, overlap_slowdown=1.0 + point[0], collective_slowdown=1.0 + point[1])

        def error(point: _Point) -> float:
            improbable = sum(map(_improbable, point, (_SLOWED, _SLOWED, _FACTOR)))
            return self._error(cases, rates(point), self._scaled(point[2])) + improbable

        point = min((_search(error, (first, first, 1.0)) for first in _SLOWDOWNS), key=error)
        self.rates, self.collectives = rates(point), self._scaled(point[2])

    def _scaled(self, factor: float) -> tuple[MeasuredCollective, ...]:
        return tuple(replace(c, seconds=tuple(factor * s for s in c.seconds)) for c in self._hardware.collectives)

    def zero(self) -> None:
        """Fit what frameworks compute to gather and scatter parameters and gradients, beside the collectives."""
        if not (cases := self._cases(ZERO)):
            return
        system = [[case.works[0].gathered / case.measured, case.works[0].scattered / case.measured] for case in cases]
        gathered, scattered = fitting.non_negative(np.array(system), np.array(self._extra(cases, self.rates)))
        self.rates = replace(self.rates, seconds_per_gathered_element=gathered, seconds_per_scattered_element=scattered)

    def _extra(self, cases: Sequence[_Case], rates: Rates) -> list[float]:
        """Return the share of each step that is not predicted by ``rates``."""
        machine = replace(self._hardware, rates=(rates,), collectives=self.collectives)
        return [1.0 - case.predicted(machine) / case.measured for case in cases]

    def tensor(self) -> None:
        """Fit what collectives between tensor ranks cost, for which the computation waits."""
        self._near_usual(TENSOR, {"blocking_factor": _FACTOR, "blocking_seconds": _WAIT})

    def pipeline(self) -> None:
        """Fit what a stage's pass takes beside its operations, and what the bubble costs."""
        self._near_usual(PIPELINE, {"pass_seconds": _PASS, "bubble_factor": _BUBBLE})

    def _near_usual(self, kind: str, usual: Mapping[str, _Usual]) -> None:
        """Fit the named rates to the steps of a kind, from what is usual on."""
        if not (cases := self._cases(kind)):
            return

        def rates(point: _Point) -> Rates:
            pairs = zip(usual, point, strict=True)
            changed: dict[str, Any] = {name: min(value, _MOST.get(name, math.inf)) for name, value in pairs}
            return replace(self.rates, **changed)

        def error(point: _Point) -> float:
            improbable = sum(map(_improbable, point, usual.values()))
            return self._error(cases, rates(point), self.collectives) + improbable

        self.rates = rates(_search(error, tuple(median_of for median_of, _ in usual.values())))

    def compressors(self) -> None:
        """Fit the seconds of compressors by element and by tensor; of the outer update by element and by round."""
        known = {}
        for kind in dict.fromkeys(timed.kind for timed in self._layouts):
            if kind not in (DATA, ZERO, TENSOR, PIPELINE):
                known[kind] = self._compressor(kind)
        self.rates = replace(self.rates, compressors=known)

    def _compressor(self, kind: str) -> CompressorRate:
        cases = self._cases(kind)
        # Relative to the step, as the error of its prediction will be.
        system = [[amount / case.measured for amount in _compressed(case.works[0], kind)] for case in cases]
        extra = self._extra(cases, replace(self.rates, compressors={kind: CompressorRate(0.0)}))
        # What doesn't grow with the elements is of operations that are started: no more than usual without a reason.
        started = _OPERATIONS * max(_OPERATION, self.rates.seconds_per_operation)
        per_element, each = fitting.non_negative(np.array([*system, [0.0, _ERROR / started]]), np.array([*extra, 0.0]))
        if kind == OUTER_UPDATE:
            return CompressorRate(per_element, seconds_per_bucket=each)
        return CompressorRate(per_element, seconds_per_tensor=each)


def _compressed(work: Work, kind: str) -> tuple[float, float]:
    """Return elements and tensors that a step compresses; of an outer update, the shares that fall on a step."""
    if kind == OUTER_UPDATE:
        return work.rounds_bytes / 12, work.rounds_share
    return sum(bucket.compressed for bucket in work.buckets), sum(bucket.tensors for bucket in work.buckets)


class _Case:
    """A measured step, and its prediction."""

    def __init__(self, model: TimedModel) -> None:
        self.measured = trimmed_mean(model)
        self._config, self._mesh = model.config, model.mesh
        habits, stages = habits_of(model.config), range(model.mesh.pipeline)
        works = [work_of(model.config, model.spec, model.mesh, model.mesh.rank_of(stage), habits) for stage in stages]
        self.works = [work for work in works if work is not None]

    def predicted(self, hardware: Hardware) -> float:
        """Return the seconds of the step on ``hardware``."""
        config, per_node = self._config, min(hardware.ranks_per_node, self._mesh.size)
        computation = Computation(hardware, config.framework, config.train.precision, per_node)
        network = Network(hardware, self._mesh, config.framework)
        return step_time(self.works, config.parallel.schedule, computation, network).seconds


def _improbable(figure: float, usual: _Usual) -> float:
    """Return how improbable a figure is, in the unit of errors."""
    median_of, deviation = usual
    return (math.log(figure / median_of) / deviation) ** 2


def _search(error: Callable[[_Point], float], start: _Point) -> _Point:
    """Return the point with the least error, by multiplying one figure after the other by ever smaller steps."""
    best, least, step = start, error(start), _FIRST_STEP
    while step > _LAST_STEP:
        moved = False
        for trial in _around(best, step):
            if (value := error(trial)) < least:
                best, least, moved = trial, value, True
                break
        if not moved:
            step = math.sqrt(step)
    return best


def _around(point: _Point, step: float) -> Iterable[_Point]:
    for index, value in enumerate(point):
        for factor in (step, 1.0 / step):
            if value * factor > 1e-9:
                yield (*point[:index], value * factor, *point[index + 1 :])
