"""``plan --measure``: measures this machine with the ranks of this launch, and adds it to a hardware file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hvdlm.config import Config
from hvdlm.parallel.mesh import Mesh, make_mesh
from hvdlm.planning.gradient_work import work_of
from hvdlm.planning.hardware import Rates
from hvdlm.protocols.world import World
from hvdlm_planner import fitting
from hvdlm_planner.calibrations import ALONE, Calibration, config_of
from hvdlm_planner.timed_steps import Ranks, TimedModel, build, connect, median, spread, take_turns, warm_up

_TURN = 0.06  # seconds of a calibration's turn
_ROUNDS = 9
_NOISY = 0.25  # spread of a calibration's turns above which the machine was busy


@dataclass(frozen=True)
class Fit:
    """Rates, and how well they fit the steps that they were fitted to.

    Attributes:
        error: the median of the relative errors, as a share.
        spread: the median distance of the quartiles of a calibration's turns, as a share of their median.
    """

    rates: Rates
    error: float
    spread: float


def alone_world(world: World) -> World:
    """Return a world of this rank alone, on the same device."""
    from hvdlm_backends.local import LocalWorld

    return LocalWorld(world.local_rank)


def computing(ranks: Ranks, base: Config, say: Progress) -> Fit:
    """Return the rates at which the ranks compute, all at once and each by itself. All ranks call."""
    world = alone_world(ranks.world)
    models = []
    for index, one in enumerate(ALONE):
        say(f"building calibration {index + 1} of {len(ALONE)}")
        models.append(build(config_of(base, one), one.vocab, world, ranks.framework))
        warm_up(models[-1:], ranks.world, _TURN)
    say("timing calibrations")
    take_turns(models, ranks.world, _ROUNDS)
    return fitted(models, ranks)


def fitted(models: Sequence[TimedModel], ranks: Ranks) -> Fit:
    """Return the rates that fit the median seconds of the models' steps best."""
    works = [work_of(model.config, model.spec, model.mesh, 0, fused=model.config.train.compile is True) for model in models]
    precision = models[0].config.train.precision
    item = 4 if precision == "fp32" else 2
    system = [fitting.amounts(work, item) for work in works if work is not None]
    seconds = [median(model) for model in models]
    constants = fitting.fit(system, seconds)
    errors = sorted(abs(error) for error in fitting.errors(system, constants, seconds))
    spreads = sorted(spread(model.seconds) for model in models)
    rates = rates_of(constants, ranks.framework.name, precision, ranks.world.local_size)
    return Fit(rates, errors[len(errors) // 2], spreads[len(spreads) // 2])
