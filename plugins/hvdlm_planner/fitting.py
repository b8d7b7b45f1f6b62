"""Rates of a machine from the seconds of training steps: non-negative least squares over kinds of work.

The seconds of a step are taken as a sum over the kinds of work that ``hvdlm.planning.work`` counts, each times a
constant of the machine, framework and precision. The constants are fitted to steps of a few small models that differ in
which kind dominates. Relative errors count, so that short steps, which show the overhead, weigh as much as long ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hvdlm.planning.work import Attention, Work

# Kinds of work, each with the unit of its constant: seconds per ...
KINDS = (
    "product_flops",
    "product_bytes",
    "attention_flops",
    "bytes",
    "scores",
    "operations",
    "micro_batches",
    "steps",
    "updates",
)


def amounts(work: Work, item: int = 4) -> list[float]:
    """Return how much of each of ``KINDS`` one rank's step has; ``item``: bytes of an element of a product."""
    total = work.forward + work.backward
    count = work.micro_batches
    each = [
        sum(product.flops for product in total.products),
        sum(item * (p.m * p.k + p.k * p.n + p.m * p.n) * p.count for p in total.products),
        sum(_attention_flops(attention) for attention in total.attention),
        total.bytes,
        0.5 * total.scores,  # counted in the forward and in the backward pass
        total.operations,
    ]
    whole = [count * amount for amount in each]
    whole[KINDS.index("bytes")] += work.update_bytes
    return [*whole, float(count), 1.0, work.update_elements]


# Bytes of memory whose seconds those of a kind are usually like, and the standard deviation of the ratio's logarithm.
# Where the timed steps don't tell kinds apart, as products' bytes from those of element-wise operations, these decide.
_BYTES_OF = {"product_bytes": (1.0, 0.7), "bytes": (1.0, 0.7), "updates": (32.0, 0.7), "scores": (12.0, 1.0)}
_ATTENTION = (2.0, 1.0)  # the same of attention's FLOPs and those of products
_ERROR = 0.03  # relative standard deviation of a timed step at least


def _attention_flops(one: Attention) -> float:
    return one.flops * (2.5 if one.backward else 1.0)


def fit(system: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Return the constants, none below zero, that minimise the relative errors of ``system`` times them.

    Args:
        system: the amounts of each measured step, ``[steps, kinds]``.
        seconds: measured, ``[steps]``.
    """
    relative = np.array(system, float) / np.array(seconds, float)[:, None]
    return non_negative(relative, np.ones(len(seconds)))


def regularised_fit(
    system: Sequence[Sequence[float]], seconds: Sequence[float], seconds_per_byte: float, error: float = _ERROR
) -> list[float]:
    """Return the most probable constants of ``KINDS``: near what is usual where the steps don't tell; see ``fit``.

    Args:
        system, seconds: as of ``fit``.
        seconds_per_byte: of a copy, where even all bytes together seem to take no time.
        error: relative standard error of the seconds.
    """
    relative = np.array(system, float) / np.array(seconds, float)[:, None]
    usual = _usual(relative, seconds_per_byte)
    weights = np.array([max(error, _ERROR) / deviation for _, deviation in usual.values()])
    rows = np.zeros((len(usual), len(KINDS)))
    for row, weight, (kind, (constant, _)) in zip(rows, weights, usual.items(), strict=True):
        row[KINDS.index(kind)] = weight / constant
    return non_negative(np.vstack([relative, rows]), np.concatenate([np.ones(len(seconds)), weights]))


def _usual(relative: np.ndarray, seconds_per_byte: float) -> dict[str, tuple[float, float]]:
    """Return the usual constants by kind, and the deviations of their logarithms.

    They follow from those of products' FLOPs and of bytes, fitted with all bytes as of one kind.
    """
    moving = [KINDS.index(kind) for kind in _BYTES_OF]
    others = [index for index in range(len(KINDS)) if index not in moving]  # the first: FLOPs of products
    counts = np.array([count for count, _ in _BYTES_OF.values()])
    joined = np.column_stack([relative[:, others], relative[:, moving] @ counts])
    per_flop, *_, per_byte = non_negative(joined, np.ones(len(relative)))
    per_byte = per_byte or seconds_per_byte
    usual = {kind: (count * per_byte, deviation) for kind, (count, deviation) in _BYTES_OF.items()}
    if per_flop:
        usual["attention_flops"] = (_ATTENTION[0] * per_flop, _ATTENTION[1])
    return usual


def non_negative(system: np.ndarray, target: np.ndarray) -> list[float]:
    """Return the ``x``, none below zero, that minimises ``|system x - target|``; columns may differ by any factor."""
    scale = np.abs(system).max(0)
    scale[scale == 0] = 1.0
    constants: list[float] = (_non_negative(system / scale, target) / scale).tolist()
    return constants


def _non_negative(system: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return the non-negative ``x`` that minimises ``|system x - target|`` (Lawson and Hanson 1974, chapter 23)."""
    count = system.shape[1]
    x, free = np.zeros(count), np.zeros(count, bool)
    for _ in range(10 * count):
        gradient = system.T @ (target - system @ x)
        if not (~free & (gradient > 1e-12)).any():
            break
        free[int(np.argmax(np.where(free, -np.inf, gradient)))] = True
        while True:
            trial = np.zeros(count)
            trial[free] = np.linalg.lstsq(system[:, free], target, rcond=None)[0]
            if (trial[free] > 0).all():
                break
            falling = free & (trial <= 0)
            step = (x[falling] / (x[falling] - trial[falling])).min()
            x = x + step * (trial - x)
            free &= x > 1e-15
        x = trial
    return x


def errors(system: Sequence[Sequence[float]], constants: Sequence[float], seconds: Sequence[float]) -> list[float]:
    """Return the relative errors of the fit, one for each measured step."""
    predicted = np.array(system, float) @ np.array(constants, float)
    return (predicted / np.array(seconds, float) - 1.0).tolist()
