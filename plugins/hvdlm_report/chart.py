"""Curves as SVG, without a library: what a page draws by itself, offline, in any browser."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from hvdlm_report.runs import Curve

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 460, 240, 62, 28, 10
_POINTS = 600
_TICKS = 5


def chart(title: str, unit: str, curves: Mapping[str, Curve], marks: Sequence[int] = ()) -> str:
    """Return a figure of ``curves`` over steps; ``marks``: steps at which a vertical line stands. Nothing: ``""``."""
    drawn = {name: thinned(curve) for name, curve in curves.items() if curve}
    if not drawn:
        return ""
    steps = [step for curve in drawn.values() for step in curve]
    values = [value for curve in drawn.values() for value in curve.values()]
    x = _scale(min(steps), max(steps), _LEFT, _WIDTH - 8)
    low, high = _room(min(values), max(values))
    y = _scale(low, high, _HEIGHT - _BOTTOM, _TOP)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)} over steps">']
    for tick in ticks(low, high):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text class="tick" text-anchor="end" x="{_LEFT - 6}" y="{y(tick) + 4:.1f}">{short(tick)}</text>')
    for tick in ticks(min(steps), max(steps)):
        parts.append(
            f'<text class="tick" text-anchor="middle" x="{x(tick):.1f}" y="{_HEIGHT - 8}">{short(tick)}</text>'
        )
    parts += [f'<line class="mark" x1="{x(s):.1f}" x2="{x(s):.1f}" y1="{_TOP}" y2="{y(low):.1f}"/>' for s in marks]
    for number, name in enumerate(curves):  # a run keeps its color where another has no such curve
        if name not in drawn:
            continue
        curve = drawn[name]
        points = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in curve.items())
        last = list(curve.items())[-1]
        told = f"{escape(name)}: {last[1]:.6g} at step {last[0]}"
        parts.append(f'<polyline class="run{number}" points="{points}"><title>{told}</title></polyline>')
        parts.append(f'<circle class="run{number}" cx="{x(last[0]):.1f}" cy="{y(last[1]):.1f}" r="3"/>')
    heading = f"{escape(title)}{f' <small>{escape(unit)}</small>' if unit else ''}"
    return f"<figure><figcaption>{heading}</figcaption>{''.join(parts)}</svg></figure>"


def thinned(curve: Curve) -> Curve:
    """Return at most about 600 points of a curve, the lowest and the highest of every stretch among them."""
    items = sorted(curve.items())
    if len(items) <= _POINTS:
        return dict(items)
    stretch = -(-2 * len(items) // _POINTS)
    kept = {items[0], items[-1]}
    for start in range(0, len(items), stretch):
        part = items[start : start + stretch]
        kept |= {min(part, key=lambda item: item[1]), max(part, key=lambda item: item[1])}
    return dict(sorted(kept))


def ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers from ``low`` to ``high``."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / _TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """Return a number in few characters: 1.2k, 3M, 0.05."""
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.4g}{letter}"
    return f"{value:.4g}"


def _room(low: float, high: float) -> tuple[float, float]:
    room = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    return (max(0.0, low - room) if low >= 0 else low - room), high + room


def _scale(low: float, high: float, first: float, last: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: first + (value - low) / span * (last - first)
