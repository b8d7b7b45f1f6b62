"""``plan --simulate``: a run on many ranks with stragglers, jitter and failures; its scaling from 8 to 4,096 ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.parallel.mesh import Mesh
from hvdlm.planning.gradient_work import unknown
from hvdlm.planning.hardware import Hardware
from hvdlm.planning.simulator import Simulated, simulate
from hvdlm.planning.simulator_costs import StepCosts, step_costs
from hvdlm.planning.simulator_failures import Failures, best_interval, survive
from hvdlm_planner.habits import habits_of
from hvdlm_planner.planned_run import PlannedRun
from hvdlm_planner.simulate_options import SimulateOptions

RANKS = tuple(2**power for power in range(3, 13))
"""Ranks of the scaling, where copies of the model fit into them: 8 to 4,096."""

CAUSES = ("compute", "communication", "bubble", "data", "stragglers", "jitter", "saves", "lost work", "restarts")
"""What the time of a run is attributed to."""

_FAILURES = 10_000  # of which the mean is taken


@dataclass(frozen=True)
class SimulatedRun:
    """A simulated run.

    Attributes:
        mesh: its ranks.
        costs: of its steps.
        steps: of the whole run.
        step: the simulated steps.
        seconds: of the whole run, by cause; infinite where it loses more than it computes.
        failures: of the whole run; ``mtbf`` is infinite where there are none.
        failed: expected number of failures in the run.
        interval: steps between saves.
        tokens: of a step.
        token_rate: tokens per second of training, failures included.
    """

    mesh: Mesh
    costs: StepCosts
    steps: int
    step: Simulated
    seconds: dict[str, float]
    failures: Failures
    failed: float
    interval: int
    tokens: int

    @property
    def total(self) -> float:
        """Seconds of the whole run."""
        return sum(self.seconds.values())

    @property
    def efficiency(self) -> float:
        """The share of its time for which a rank computes undisturbed; 0: the run never ends."""
        return self.seconds["compute"] / self.total if math.isfinite(self.total) else 0.0

    @property
    def token_rate(self) -> float:
        """Tokens per second, over all of the run's time."""
        return self.tokens * self.steps / self.total


def simulate_run(run: PlannedRun, hardware: Hardware, options: SimulateOptions) -> SimulatedRun:
    """Simulate a planned run.

    Raises:
        HvdlmError: the work of the model is unknown, or how long a save takes.
    """
    if run.config.communication.exchange == "streaming_diloco":
        raise HvdlmError(
            "--simulate: ranks wait for each other at the end of every round or step, and those of streaming_diloco "
            "don't: simulate diloco, which takes longer."
        )
    planned = step_costs(run.config, run.spec, run.mesh, hardware, run.moments, habits_of(run.config))
    if planned is None:
        raise HvdlmError(f"--simulate: {unknown(run.config, run.spec)}.")
    costs, save = planned
    disturbances = options.disturbances
    deviation = hardware.speed_deviation if options.speed_deviation is None else options.speed_deviation
    step = simulate(costs, replace(disturbances, speed_deviation=deviation), options.steps)
    config = run.config
    steps, every = config.train.steps, config.checkpoint.every
    interval = min(every, steps) if every else steps
    failures = _failures(run.mesh, hardware, options, options.save if options.save is not None else save)
    seconds = {cause: steps * value for cause, value in step.seconds.items()}
    spent, failed = with_failures(steps * step.step, interval * step.step, failures, disturbances.seed)
    return SimulatedRun(
        run.mesh,
        costs,
        steps,
        step,
        seconds | spent,
        failures,
        failed,
        interval,
        config.train.batch_size * config.data.context,
    )


def _failures(mesh: Mesh, hardware: Hardware, options: SimulateOptions, save: float | None) -> Failures:
    rate = mesh.size / options.rank_mtbf + math.ceil(mesh.size / hardware.ranks_per_node) / options.node_mtbf
    if not rate:
        return Failures(math.inf, options.restart, save or 0.0, options.write)
    if save is None:
        raise HvdlmError(
            f"--simulate: how long a save pauses training is unknown, since {hardware.name} has no "
            "save_bytes_per_second: give it as --save 20s."
        )
    return Failures(1 / rate, options.restart, save, options.write)


def with_failures(
    work: float, interval: float, failures: Failures, seed: int, count: int = _FAILURES
) -> tuple[dict[str, float], float]:
    """Return the expected seconds of saves, lost work and restarts in ``work`` seconds of work, and of failures.

    Expected: the mean over as many such runs, one after the other, as have ``count`` failures.
    """
    saves = failures.save * max(0, math.ceil(work / interval) - 1)
    if math.isinf(failures.mtbf):
        return {"saves": saves, "lost work": 0.0, "restarts": 0.0}, 0.0
    runs = max(1, math.ceil(count * failures.mtbf / work))
    result = survive(runs * work, interval, failures, np.random.default_rng(seed), most=100 * count)
    if result is None:
        return {"saves": saves, "lost work": math.inf, "restarts": math.inf}, math.inf
    spent = {"saves": result.saves, "lost work": result.lost_work, "restarts": result.restarts}
    return {cause: seconds / runs for cause, seconds in spent.items()}, result.failures / runs


def best_steps(run: SimulatedRun) -> int | None:
    """Return the steps between saves that lose least; None without failures."""
    if math.isinf(run.failures.mtbf):
        return None
    return min(run.steps, max(1, round(best_interval(run.failures) / run.step.step)))


def scale(run: PlannedRun, hardware: Hardware, options: SimulateOptions) -> list[SimulatedRun]:
    """Simulate the run on 8 to 4,096 ranks: the data axis grows, with the same sequences on every rank.

    At each number of ranks, saves are as far apart as loses least.
    """
    options = replace(options, steps=min(options.steps, 100))
    unit = model_ranks(run.mesh) * run.mesh.data_per_node
    return [_best(resize(run, ranks), hardware, options) for ranks in RANKS if not ranks % unit]


def _best(run: PlannedRun, hardware: Hardware, options: SimulateOptions) -> SimulatedRun:
    simulated = simulate_run(run, hardware, options)
    best = best_steps(simulated)
    if best is None:
        return simulated
    return save_every(simulated, best, options.disturbances.seed)


def save_every(run: SimulatedRun, interval: int, seed: int) -> SimulatedRun:
    """Return a simulated run that saves every ``interval`` steps."""
    spent, failed = with_failures(run.steps * run.step.step, interval * run.step.step, run.failures, seed)
    return replace(run, seconds=run.seconds | spent, failed=failed, interval=interval)


def model_ranks(mesh: Mesh) -> int:
    """Return the number of ranks that compute the same rows together."""
    return mesh.size // mesh.data


def resize(run: PlannedRun, ranks: int) -> PlannedRun:
    """Return the run on another number of ranks, with as many sequences on each."""
    data = ranks // model_ranks(run.mesh)
    rows = run.config.train.batch_size // run.mesh.data
    config: Config = replace(
        run.config,
        train=replace(run.config.train, batch_size=rows * data),
        parallel=replace(run.config.parallel, data=data),
    )
    return replace(run, config=config, mesh=replace(run.mesh, data=data))


def content(runs: Sequence[SimulatedRun], name: str) -> dict[str, object]:
    """Return the figures of a scaling for its JSON file: ``hvdlm report`` draws them."""
    rows = [
        {
            "ranks": run.mesh.size,
            "tokens_per_second": run.token_rate,
            "efficiency": run.efficiency,
            "shares": {cause: run.seconds[cause] / run.total for cause in CAUSES} if run.efficiency else {},
        }
        for run in runs
    ]
    return {"kind": "scaling", "name": name, "rows": rows}
