"""Simulates steps of many ranks of which some are slow and all are jittered; no tensors, only times.

The time of a run is attributed to causes by comparison: what the same steps take without the cause. Of the seconds of
undisturbed steps, those that remain without any collective or message are computation and bubble; what stragglers
add to undisturbed steps is theirs; what jitter adds to the same steps with the same stragglers is its own. The parts
add up to the time of the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from hvdlm.parallel.mesh import Mesh
from hvdlm.planning.simulator_costs import Bucket, StepCosts
from hvdlm.planning.simulator_steps import step_ends

_BLOCK = 2**19  # times held at once, by rank, micro-batch and step: 4 MiB an array
_ROUNDING = 1e-11  # share of a run's time that is no cause's, but rounding


@dataclass(frozen=True)
class Disturbances:
    """What makes ranks slower than the costs say, and by how much.

    Attributes:
        straggler_share: fraction of the ranks, drawn once, that are slow in every step.
        straggler_rate: probability of each other rank to be slow in a step, drawn anew for every step.
        straggler_factor: of a slow rank's seconds of computing.
        speed_deviation: standard deviation of the ranks' speeds, which are normal, relative to their mean; drawn once.
        jitter: standard deviation of a rank's seconds of computing in a step, relative to their mean.
        distribution: of the jitter: lognormal or gamma, with mean 1.
        seed: of all that is drawn.
    """

    straggler_share: float = 0.0
    straggler_rate: float = 0.0
    straggler_factor: float = 1.0
    speed_deviation: float = 0.0
    jitter: float = 0.0
    distribution: Literal["lognormal", "gamma"] = "lognormal"
    seed: int = 1

    def slowness(self, mesh: Mesh, steps: int, block: int) -> Iterator[np.ndarray]:
        """Yield every rank's factor in ``steps`` steps, ``block`` steps at once: ``[steps, data, pipeline, tensor]``.

        The factors don't depend on ``block``.
        """
        persistent, transient, jitter = (np.random.default_rng(s) for s in np.random.SeedSequence(self.seed).spawn(3))
        slow = np.zeros(mesh.size, bool)
        slow[persistent.permutation(mesh.size)[: round(self.straggler_share * mesh.size)]] = True
        # A device of less than half the mean speed is replaced, or a straggler.
        own = np.maximum(1.0 + self.speed_deviation * persistent.standard_normal(mesh.size), 0.5)
        for first in range(0, steps, block):
            shape = (min(block, steps - first), mesh.size)
            now = slow | (transient.random(shape) < self.straggler_rate) if self.straggler_rate else slow
            factors = np.where(now, self.straggler_factor, 1.0) * own * self._jittered(jitter, shape)
            yield factors.reshape(-1, *mesh.shape)

    def _jittered(self, generator: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        variance = self.jitter**2
        if not variance:
            return np.ones(shape)
        if self.distribution == "gamma":
            return generator.gamma(1 / variance, variance, shape)
        log_variance = np.log1p(variance)
        drawn = generator.standard_normal(shape)
        drawn *= np.sqrt(log_variance)
        drawn -= log_variance / 2
        return np.exp(drawn, out=drawn)


CAUSES = ("compute", "communication", "bubble", "data", "stragglers", "jitter")
"""What a step's time is attributed to."""


@dataclass(frozen=True)
class Simulated:
    """The result of a simulation.

    Attributes:
        seconds: of a step by cause, the mean over all steps: compute (the mean over ranks), communication (not hidden
            behind computing), bubble (waiting in the pipeline, for slower stages too), data, stragglers, jitter.
        ends: the seconds since the start at which the last rank has ended each step.
    """

    seconds: dict[str, float]
    ends: np.ndarray

    @property
    def step(self) -> float:
        """The mean seconds of a step."""
        return float(self.ends[-1] / len(self.ends))

    @property
    def efficiency(self) -> float:
        """The fraction of its time for which a rank computes undisturbed."""
        return self.seconds["compute"] / self.step


def simulate(costs: StepCosts, disturbances: Disturbances, steps: int) -> Simulated:
    """Simulate ``steps`` steps, and the same without jitter, without stragglers, and without communication."""
    ends = run(costs, disturbances, steps)
    total = ends[-1]
    steady = replace(disturbances, jitter=0.0)
    with_stragglers = total if disturbances == steady else run(costs, steady, steps)[-1]
    ideal = run(costs, Disturbances(), steps)[-1]
    silent = run(without_communication(costs), Disturbances(), steps)[-1]
    compute = costs.computing(steps)
    seconds = {
        "compute": compute,
        "communication": ideal - silent,
        "bubble": silent - compute - steps * costs.data,
        "data": steps * costs.data,
        "stragglers": with_stragglers - ideal,
        "jitter": total - with_stragglers,
    }
    rounding = _ROUNDING * total
    return Simulated({c: float(seconds[c]) / steps if abs(seconds[c]) > rounding else 0.0 for c in CAUSES}, ends)


def run(costs: StepCosts, disturbances: Disturbances, steps: int) -> np.ndarray:
    """Return the seconds since the start at which the last rank has ended each step, ``[steps]``."""
    block = max(1, _BLOCK // (costs.mesh.size * costs.micro_batches))
    # Of a pass, the slowest tensor rank decides.
    slowness = (factors.max(axis=3) for factors in disturbances.slowness(costs.mesh, steps, block))
    return np.concatenate([ends.max(axis=(1, 2)) for ends in step_ends(costs, slowness, steps)])


def without_communication(costs: StepCosts) -> StepCosts:
    """Return ``costs`` with collectives and messages that take no time."""
    silent: dict[str, Any] = {"tensor_forward": 0.0, "tensor_backward": 0.0, "gather": 0.0, "round": 0.0}
    stages = tuple(replace(s, buckets=tuple(Bucket(b.ready, 0.0) for b in s.buckets), **silent) for s in costs.stages)
    return replace(costs, stages=stages, message=0.0, metrics=0.0, tied=0.0, norm=0.0, vote=0.0)
