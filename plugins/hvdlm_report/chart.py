"""Line charts as SVG, drawn without a library and shown by any browser offline."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from hvdlm_report.axes import Axis, axis_range, labels
from hvdlm_report.curves import smoothed, thinned
from hvdlm_report.runs import Curve

WIDTH, HEIGHT = 400, 230
FONT = 12  # size of labels; on a phone, a chart is shown at about nine tenths
_LETTER = 0.62 * FONT  # width of a digit, at most
_RIGHT, _BOTTOM, _TOP = 8, 28, 10  # margins; the left one depends on the labels
_AT = {"steps": "at step %", "ranks": "on % ranks"}  # where a value was read
_SMALLEST = 1e-100  # value on a logarithmic axis

NamedCurve = tuple[str, Curve]
"""The name of a run, and its curve."""


@dataclass(frozen=True)
class Chart:
    """What a chart shows.

    Attributes:
        title: its heading.
        unit: of the values, shown beside the heading.
        smooth: whether a moving average is drawn over the curves.
        tokens_per_step: of every run, for an axis of tokens; None: there is no such axis.
        over: what the curves run over: steps, or ranks, which have a logarithmic axis.
    """

    title: str
    unit: str = ""
    smooth: bool = False
    tokens_per_step: Sequence[int] | None = None
    over: Literal["steps", "ranks"] = "steps"


def draw(chart: Chart, curves: Sequence[NamedCurve], marks: Sequence[int] = ()) -> str:
    """Return a figure of every run's curve, with a vertical line at each step in ``marks``; empty without any curve.

    It holds a drawing for each kind of axis (steps or tokens, linear or logarithmic), of which the style sheet shows
    the one that is chosen, and the points for the script that shows values.
    """
    if not any(curve for _, curve in curves):
        return ""
    heading = f"{escape(chart.title)}{f' <small>{escape(chart.unit)}</small>' if chart.unit else ''}"
    points = [[list(item) for item in thinned(curve).items()] for _, curve in curves]
    values = {"runs": [name for name, _ in curves], "points": points, "over": _AT[chart.over]}
    data = escape(json.dumps(values, separators=(",", ":")))
    drawings = "".join(_drawings(chart, curves, marks))
    # Without the script, the output stays empty and takes no space.
    return f'<figure data-chart="{data}"><figcaption>{heading}</figcaption>{drawings}<output></output></figure>'


def _drawings(chart: Chart, curves: Sequence[NamedCurve], marks: Sequence[int]) -> Iterator[str]:
    positive = [(name, {s: v for s, v in curve.items() if v > _SMALLEST}) for name, curve in curves]
    ones = [1] * len(curves)
    for horizontal, factors in (("steps", ones), ("tokens", chart.tokens_per_step)):
        if factors:
            yield _Drawing(chart, f"{horizontal} linear", factors, curves).svg(marks)
            log = any(curve for _, curve in positive)
            yield _Drawing(chart, f"{horizontal} log", factors, positive if log else curves, log).svg(marks)


class _Drawing:
    """A chart on one kind of axes; ``factors``: horizontal units per step of every run."""

    def __init__(
        self, chart: Chart, kind: str, factors: Sequence[int], curves: Sequence[NamedCurve], log: bool = False
    ) -> None:
        self._chart = chart
        self._kind = kind
        self._factors = factors
        self._names = [name for name, _ in curves]
        self._curves = [thinned(curve) for _, curve in curves]
        self._averages = [thinned(smoothed(curve)) if chart.smooth else {} for _, curve in curves]
        low, high = axis_range([value for curve in self._curves for value in curve.values()], log)
        self._y = Axis(low, high, HEIGHT - _BOTTOM, _TOP, log)
        self._y_ticks = list(zip(self._y.ticks(), labels(self._y.ticks()), strict=True))
        self._left = 8 + _LETTER * max(len(label) for _, label in self._y_ticks)
        ends = [step * factor for curve, factor in zip(self._curves, factors, strict=True) for step in curve]
        self._x = Axis(min(ends), max(ends), self._left, WIDTH - _RIGHT, chart.over == "ranks")
        self._x_ticks = sorted(set(map(float, ends))) if self._x.log else self._x.ticks()

    def svg(self, marks: Sequence[int]) -> str:
        """Return the drawing."""
        x = self._x
        axes = f"{x.low:.17g},{x.high:.17g},{x.first:.1f},{x.last:.1f}"
        horizontal = self._kind.split()[0]
        label = f"{escape(self._chart.title)} over {self._chart.over if horizontal == 'steps' else horizontal}"
        head = f'<svg class="{self._kind}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}" '
        head += f'data-x="{axes}" data-log="{int(x.log)}" data-factors="{",".join(map(str, self._factors))}">'
        return "".join([head, *self._grid(), *self._marks(marks), *self._lines(), '<line class="cursor"/></svg>'])

    def _grid(self) -> Iterator[str]:
        for value, label in self._y_ticks:
            y = self._y.position(value)
            yield f'<line class="grid" x1="{self._left:.1f}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            yield f'<text class="tick" text-anchor="end" x="{self._left - 6:.1f}" y="{y + 4:.1f}">{label}</text>'
        values = self._x_ticks
        names = [f"{value:.0f}" for value in values] if self._x.log else labels(values)
        half = _LETTER * max(map(len, names)) / 2
        stride = 1 + int(2.3 * half * len(names) / (WIDTH - self._left))  # labels don't overlap
        for value, label in list(zip(values, names, strict=True))[::stride]:
            half = _LETTER * len(label) / 2
            x = min(max(self._x.position(value), half), WIDTH - half)  # all labels stay within the drawing
            yield f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{HEIGHT - 8}">{label}</text>'

    def _marks(self, marks: Sequence[int]) -> Iterator[str]:
        for step in marks:
            x = self._x.position(step * self._factors[0])
            if not self._left <= x <= WIDTH:
                continue
            yield f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>'

    def _lines(self) -> Iterator[str]:
        for number, name in enumerate(self._names):  # a run has the same color in every chart
            curve, average = self._curves[number], self._averages[number]
            if not curve:
                continue
            yield self._line(curve, number, f"raw run{number}" if average else f"run{number}", name)
            if average:
                yield self._line(average, number, f"smooth run{number}", f"{name}, smoothed")
            step, value = list(curve.items())[-1]
            x, y = self._x.position(step * self._factors[number]), self._y.position(value)
            yield f'<circle class="run{number}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'

    def _line(self, curve: Curve, number: int, kind: str, name: str) -> str:
        factor = self._factors[number]
        points = " ".join(f"{self._x.position(s * factor):.1f},{self._y.position(v):.1f}" for s, v in curve.items())
        return f'<polyline class="{kind}" points="{points}"><title>{escape(name)}</title></polyline>'
