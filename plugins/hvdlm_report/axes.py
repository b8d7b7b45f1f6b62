"""Axes of charts: ranges, positions and labels of ticks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

_TICKS = 5
_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_SMALLEST_SPAN = 1e-9  # of an axis, relative to its values: below it, floats can't tell the ticks apart


@dataclass(frozen=True)
class Axis:
    """Maps values from ``low`` to ``high`` to coordinates from ``first`` to ``last``, by logarithm if ``log``."""

    low: float
    high: float
    first: float
    last: float
    log: bool = False

    def position(self, value: float) -> float:
        """Return the coordinate of ``value``."""
        low, high = self._inner(self.low), self._inner(self.high)
        return self.first + (self._inner(value) - low) / ((high - low) or 1.0) * (self.last - self.first)

    def _inner(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def ticks(self) -> list[float]:
        """Return about five round numbers of this axis."""
        powers = log_ticks(self.low, self.high) if self.log else []
        return powers if len(powers) > 2 else ticks(self.low, self.high)


def axis_range(values: Sequence[float], log: bool = False) -> tuple[float, float]:
    """Return the range of a vertical axis; it doesn't extend below zero unless the values do."""
    low, high = min(values), max(values)
    if log:
        margin = 10 ** (0.05 * (math.log10(high) - math.log10(low))) if high > low else 1.1
        return low / margin, high * margin
    if high - low <= _SMALLEST_SPAN * abs(high):
        margin = 0.05 * abs(high) or 0.5
    else:
        margin = 0.05 * (high - low)
    return (max(0.0, low - margin) if low >= 0 else low - margin), high + margin


def ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers from ``low`` to ``high``."""
    span = high - low
    if span <= 0:
        return [low]
    exact = span / _TICKS
    power = 10.0 ** math.floor(math.log10(exact))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= exact)
    first = math.ceil(low / step - 1e-9)
    rounded = (float(f"{n * step:.15g}") for n in range(first, math.floor(high / step + 1e-9) + 1))
    return list(dict.fromkeys(rounded))  # of large numbers, neighbours may have the same digits


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten from ``low`` to ``high``, where these are few also two and five times them."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    stride = -(-len(powers) // (2 * _TICKS))
    for factors in ((1,), (1, 2, 5)):
        values = [factor * 10.0**power for power in powers[::stride] for factor in factors]
        inside = [float(f"{value:.12g}") for value in values if low <= value <= high]
        if len(inside) > 2:
            break
    return inside


def labels(values: Sequence[float]) -> list[str]:
    """Return short labels of ticks in ascending order, with as many digits as tell them apart."""
    gap = min((b - a for a, b in itertools.pairwise(values)), default=abs(values[0]))
    shortest = [short(value) for value in values]
    errors = [abs(_value(label) - value) - 1e-12 * abs(value) for label, value in zip(shortest, values, strict=True)]
    if len(set(shortest)) == len(values) and max(errors) <= 0.05 * gap:
        return shortest
    factor, letter = _unit(max(map(abs, values)))
    decimals = max(0, -math.floor(math.log10(gap / factor)))
    return [f"{value / factor:.{decimals}f}{letter}" for value in values]


def short(value: float) -> str:
    """Return a number in few characters: 1.2k, 3M, 0.05."""
    factor, letter = _unit(abs(value))
    return f"{value / factor:.4g}{letter}"


def _unit(value: float) -> tuple[float, str]:
    return next(((factor, letter) for factor, letter in _UNITS if value >= factor), (1.0, ""))


def _value(label: str) -> float:
    factor = {letter: factor for factor, letter in _UNITS if letter}.get(label[-1])
    return float(label[:-1]) * factor if factor else float(label)
