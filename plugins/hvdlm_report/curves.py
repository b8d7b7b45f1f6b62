"""Fewer points of a curve, and a smoother one."""

from __future__ import annotations

from hvdlm_report.runs import Curve

_POINTS = 400  # of a curve, at most
_LEAST = 20  # points from which on a curve is smoothed
_SHARE = 20  # a smoothed value averages over about 1 / 20 of the curve's points


def thinned(curve: Curve) -> Curve:
    """Return at most about 400 points of a curve: the lowest and the highest of each of equally long intervals."""
    items = sorted(curve.items())
    if len(items) <= _POINTS:
        return dict(items)
    length = -(-2 * len(items) // _POINTS)
    kept = {items[0], items[-1]}
    for start in range(0, len(items), length):
        interval = items[start : start + length]
        kept |= {min(interval, key=lambda item: item[1]), max(interval, key=lambda item: item[1])}
    return dict(sorted(kept))


def smoothed(curve: Curve) -> Curve:
    """Return the exponential moving average of a curve, corrected for its start; {} for a curve of few points.

    The average of the first values is theirs alone, as in Adam (Kingma and Ba 2015), not drawn towards 0.
    """
    if len(curve) < _LEAST:
        return {}
    decay = 1 - 2 / (len(curve) / _SHARE + 2)
    mean = weight = 0.0
    result = {}
    for step, value in sorted(curve.items()):
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + 1 - decay
        result[step] = mean / weight
    return result
