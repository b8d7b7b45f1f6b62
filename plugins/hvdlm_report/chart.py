"""Line charts as SVG, drawn without a library and shown by any browser offline."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from hvdlm_report.runs import Curve

_WIDTH, _HEIGHT = 460, 240
_LEFT, _RIGHT, _BOTTOM, _TOP = 62, 8, 28, 10  # margins
_POINTS = 600  # of a curve, at most
_TICKS = 5


def chart(title: str, unit: str, curves: Mapping[str, Curve], marks: Sequence[int] = ()) -> str:
    """Return a chart of ``curves`` over steps, with a vertical line at each of ``marks``; empty without any curve."""
    drawn = {name: thinned(curve) for name, curve in curves.items() if curve}
    if not drawn:
        return ""
    steps = [step for curve in drawn.values() for step in curve]
    values = [value for curve in drawn.values() for value in curve.values()]
    x = _scale(min(steps), max(steps), _LEFT, _WIDTH - _RIGHT)
    low, high = _with_margin(min(values), max(values))
    y = _scale(low, high, _HEIGHT - _BOTTOM, _TOP)
    elements = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)} over steps">']
    for tick in ticks(low, high):
        elements.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        )
        elements.append(
            f'<text class="tick" text-anchor="end" x="{_LEFT - 6}" y="{y(tick) + 4:.1f}">{short(tick)}</text>'
        )
    for tick in ticks(min(steps), max(steps)):
        elements.append(
            f'<text class="tick" text-anchor="middle" x="{x(tick):.1f}" y="{_HEIGHT - 8}">{short(tick)}</text>'
        )
    elements += [f'<line class="mark" x1="{x(s):.1f}" x2="{x(s):.1f}" y1="{_TOP}" y2="{y(low):.1f}"/>' for s in marks]
    for number, name in enumerate(curves):  # all of them: a run has the same color in every chart
        if name not in drawn:
            continue
        curve = drawn[name]
        points = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in curve.items())
        last_step, last_value = list(curve.items())[-1]
        tooltip = f"{escape(name)}: {last_value:.6g} at step {last_step}"
        elements.append(f'<polyline class="run{number}" points="{points}"><title>{tooltip}</title></polyline>')
        elements.append(f'<circle class="run{number}" cx="{x(last_step):.1f}" cy="{y(last_value):.1f}" r="3"/>')
    heading = f"{escape(title)}{f' <small>{escape(unit)}</small>' if unit else ''}"
    return f"<figure><figcaption>{heading}</figcaption>{''.join(elements)}</svg></figure>"


def thinned(curve: Curve) -> Curve:
    """Return at most about 600 points of a curve: the lowest and the highest of each of equally long intervals."""
    items = sorted(curve.items())
    if len(items) <= _POINTS:
        return dict(items)
    length = -(-2 * len(items) // _POINTS)
    kept = {items[0], items[-1]}
    for start in range(0, len(items), length):
        interval = items[start : start + length]
        kept |= {min(interval, key=lambda item: item[1]), max(interval, key=lambda item: item[1])}
    return dict(sorted(kept))


def ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers from ``low`` to ``high``."""
    span = high - low
    if span <= 0:
        return [low]
    exact = span / _TICKS
    power = 10.0 ** math.floor(math.log10(exact))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= exact)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """Return a number in few characters: 1.2k, 3M, 0.05."""
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.4g}{letter}"
    return f"{value:.4g}"


def _with_margin(low: float, high: float) -> tuple[float, float]:
    """Return the range of the vertical axis; it doesn't extend below zero unless the values do."""
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    return (max(0.0, low - margin) if low >= 0 else low - margin), high + margin


def _scale(low: float, high: float, first: float, last: float) -> Callable[[float], float]:
    """Return the linear function that maps ``low`` to ``first`` and ``high`` to ``last``."""
    span = (high - low) or 1.0
    return lambda value: first + (value - low) / span * (last - first)
