"""Failures of a long run: lost work, restarts and saves, and the interval between saves that loses least.

Failures are independent and arrive at a constant rate, so that the time between two of them is exponentially
distributed. After a failure the run restarts, which takes a while and may fail, too, and repeats what it has computed
since its newest complete checkpoint. Because the arrivals have no memory, every failure begins alike, and all of them
are simulated at once.

Best interval: Young 1974, "A first order approximation to the optimum checkpoint interval", and, as it is used here,
Daly 2006, "A higher order estimate of the optimum checkpoint interval for restart dumps": it holds where a save is not
short against the time between failures, too, as on thousands of ranks. The expected time of a run is that of Daly's
complete model, which is exact under these assumptions; the first-order formula of the lost share,
``save / interval + interval / (2 mtbf)``, is not, unless both are small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_CHUNK = 2**16  # failures drawn at once


@dataclass(frozen=True)
class Failures:
    """How often a run fails, and what that costs, in seconds.

    Attributes:
        mtbf: mean time between failures of the whole run: that of one rank or node, divided by their number.
        restart: from a failure until training continues: detection, the launcher, loading the checkpoint.
        save: for which a save pauses training.
        write: after the pause, until the checkpoint is complete on disk, while training continues.
    """

    mtbf: float
    restart: float = 0.0
    save: float = 0.0
    write: float = 0.0


@dataclass(frozen=True)
class Survived:
    """The seconds of a run with failures, by what they went into, and the number of failures."""

    work: float
    saves: float
    lost_work: float
    restarts: float
    failures: int

    @property
    def seconds(self) -> float:
        """The whole time."""
        return self.work + self.saves + self.lost_work + self.restarts

    @property
    def wasted(self) -> float:
        """The share of the time that is not work."""
        return 1 - self.work / self.seconds


def young_interval(failures: Failures) -> float:
    """Return Young's interval in seconds of work between saves, ``sqrt(2 save mtbf)``."""
    return math.sqrt(2 * failures.save * failures.mtbf)


def best_interval(failures: Failures) -> float:
    """Return Daly's interval, in seconds of work between saves; at least the time until a checkpoint is complete."""
    ratio = failures.save / (2 * failures.mtbf)
    if ratio >= 1:
        return max(failures.mtbf, failures.write)
    interval = young_interval(failures) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - failures.save
    return max(interval, failures.write)


def expected_seconds(work: float, interval: float, failures: Failures) -> float:
    """Return the expected seconds of ``work`` seconds of work with a save after every ``interval``.

    Daly 2006, complete model, for checkpoints that are complete when the pause ends (``write`` is left out).
    """
    m = failures.mtbf
    # In logarithms, since intervals far beyond mtbf overflow: such a run never ends.
    exponent = failures.restart / m + math.log(math.expm1(min((interval + failures.save) / m, 700.0)))
    return m * work / interval * math.exp(min(exponent, 700.0))


def survive(
    work: float,
    interval: float,
    failures: Failures,
    generator: np.random.Generator | None = None,
    most: int = 10**7,
) -> Survived | None:
    """Simulate a run of ``work`` seconds of work that saves after every ``interval`` of them.

    Returns:
        where the time went; None if the run hasn't ended after ``most`` failures: its checkpoints are too far apart.
    """
    generator = generator or np.random.default_rng(1)
    cycle, done, total, count = interval + failures.save, 0.0, np.zeros(3), 0
    while count < most:
        size = min(_CHUNK, most - count)
        gaps = generator.exponential(failures.mtbf, size)
        restarts = np.minimum(gaps, failures.restart)
        if count == 0:
            restarts[0] = 0.0  # the run's start is none
        rest = gaps - restarts
        # Checkpoint n is complete at ``n cycle + write``; a failure before that falls back to the one before it.
        completed = np.maximum(np.floor((rest - failures.write) / cycle), 0.0)
        remaining = work - done - interval * (np.cumsum(completed) - completed)
        needed = remaining + failures.save * np.maximum(np.ceil(remaining / interval) - 1, 0.0)
        ended = rest >= needed
        end = int(ended.argmax()) if ended.any() else size
        completed = completed[:end]
        total += [
            failures.save * completed.sum(),
            (rest[:end] - completed * cycle).sum(),
            restarts[: end + 1].sum(),
        ]
        done += interval * completed.sum()
        count += end
        if end < size:
            total[0] += needed[end] - remaining[end]
            return Survived(work, float(total[0]), float(total[1]), float(total[2]), count)
    return None
