"""Training steps of small models in given layouts, timed in turns on the ranks of a launch."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from hvdlm import plugins
from hvdlm.config import Config
from hvdlm.diagnostics.phases import process
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.mesh import Mesh, make_mesh
from hvdlm.protocols.framework import Framework, Resolved, ResolvesOptions
from hvdlm.protocols.types import Batch
from hvdlm.protocols.world import World
from hvdlm.training.run import keep_recorder, load_plugins, plan, share_phases

_DROPPED = 0.1  # share of the turns, at either end, that a mean leaves out
_QUIET = 0.1  # share of the rounds that are the quietest
_SLOWED = 0.85  # share of the usual seconds below which theirs are far from the others'
_LONG = 0.25  # seconds of a period beside which filling the caches takes none


@dataclass(frozen=True)
class Ranks:
    """The connected ranks of a launch.

    Attributes:
        threads: the framework's threads per rank.
        meshes: the layouts whose groups are connected.
    """

    world: World
    framework: Framework
    threads: int
    meshes: tuple[Mesh, ...]


def connect(config: Config, meshes: Sequence[Mesh] = ()) -> Ranks:
    """Connect the ranks of this launch with the groups of ``meshes``, beside those of ``config``. All ranks call."""
    checked = plan(config, writes=False)
    share_phases(checked)
    framework = plugins.make(checked.manager, "framework", config.framework)
    groups = {ranks: None for mesh in (checked.mesh, *meshes) for ranks in mesh.groups()}
    world = checked.backend.start(framework, list(groups), checked.config)
    process.connect(world.recorder, world.abort)
    keep_recorder(checked, world)
    return Ranks(world, framework, checked.config.train.threads or 1, (checked.mesh, *meshes))


@dataclass
class TimedModel:
    """A model in training, and the seconds of its steps: one figure for every turn, this rank's.

    Attributes:
        period: steps after which the work repeats: those of a round of local SGD, else 1.
        steps: periods of a turn.
        turn_seconds: that a turn is expected to take.
        seconds: of a step, turn by turn.
    """

    config: Config
    spec: ModelSpec
    mesh: Mesh
    trainable: Any
    micro_batches: list[Batch]
    period: int
    step: int = 0
    steps: int = 0
    turn_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)

    def run(self, periods: int) -> float:
        """Do the steps of ``periods`` rounds; return the mean seconds of one step."""
        began = time.perf_counter()
        for _ in range(periods * self.period):
            result = self.trainable.train_step(self.micro_batches, 1e-4, self.step)
            result.loss  # noqa: B018 -- the loop reads it, which waits for the device
            self.step += 1
        return (time.perf_counter() - began) / (periods * self.period)


def build(config: Config, vocab: int, world: World, framework: Framework) -> TimedModel:
    """Return the model of ``config`` on the ranks of ``world``, with random tokens to train on. All its ranks call."""
    manager = load_plugins(config)
    mesh = make_mesh(world.size, config.parallel)
    spec = plugins.find_model(manager, config.model.name)(config.model, vocab, config.data.context)
    resolver = framework if isinstance(framework, ResolvesOptions) else None
    resolved = resolver.resolve(config, spec, world) if resolver else Resolved()
    precision: Any = resolved.precision if config.train.precision == "auto" else config.train.precision
    config = replace(config, train=replace(config.train, precision=precision, compile=resolved.compile))
    exchange = plugins.make_exchange(manager, config, world, world.group(mesh.replica_group(world.rank)))
    trainable = framework.build(spec, mesh, world, exchange, config)
    local = config.communication.exchange != "all_reduce"
    period = config.communication.local.steps if local else 1
    return TimedModel(config, spec, mesh, trainable, _micro_batches(config, vocab, mesh, world.rank), period)


def _micro_batches(config: Config, vocab: int, mesh: Mesh, rank: int) -> list[Batch]:
    """Return this rank's rows of a batch of random tokens."""
    shape = (config.train.batch_size, config.data.context + 1)
    tokens = np.random.default_rng(0).integers(0, vocab, shape).astype(np.int32)
    batch = Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), None, True)
    rows = config.train.batch_size // mesh.data
    first = mesh.coordinates(rank)["data"] * rows
    size = config.train.micro_batch_size or rows
    return [batch.rows(start, start + size) for start in range(first, first + rows, size)]


def warm_up(models: Sequence[TimedModel], world: World, turn_seconds: float) -> None:
    """Do two periods of each model, and set its periods of a turn of about ``turn_seconds``. All ranks call.

    The first period builds graphs and fills caches.
    """
    for model in models:
        model.run(1)
        seconds = max(world.gather_objects(model.run(1)))
        model.steps = max(1, round(turn_seconds / (seconds * model.period)))
        model.turn_seconds = (model.steps + 1) * model.period * seconds


def take_turns(
    models: Sequence[TimedModel], world: World, number: int = 0, goes_on: Callable[[], bool] = lambda: True
) -> bool:
    """Time the models' turns of round ``number``, in alternating order; return whether all had one. All ranks call.

    A turn's figure is this rank's. Before each turn, ``goes_on()`` tells whether there is time for it.
    """
    for model in models if number % 2 == 0 else reversed(models):
        if not goes_on():
            return False
        if model.turn_seconds < _LONG * (model.steps + 1):
            model.run(1)  # untimed: another model's turn has taken its weights out of the caches
        world.gather_objects(None)  # all ranks begin together
        model.seconds.append(model.run(model.steps))
        process.alive()
    return True


def of_all_ranks(models: Sequence[TimedModel], world: World) -> None:
    """Replace the turns of all models by the medians of the ranks' turns. All ranks call.

    Of models that each rank trains by itself, they are multiplied by how much slower the slowest rank is in the mean
    of these models: for it, the others wait in a run. Its own turns alone would say little: where ranks share cores,
    each of them is slow in one turn and fast in the next.
    """
    turns = np.array(world.gather_objects([model.seconds for model in models]))  # [ranks, models, rounds]
    alone = [model.mesh.size == 1 for model in models]
    speeds = np.log(np.median(turns[:, alone], axis=2)).mean(1) if any(alone) else np.zeros(1)
    slower = float(np.exp(speeds.max() - speeds.mean()))
    for model, by_itself, seconds in zip(models, alone, np.median(turns, axis=0), strict=True):
        model.seconds = (seconds * (slower if by_itself else 1.0)).tolist()


def drop_partial_round(models: Sequence[TimedModel]) -> None:
    """Drop the turns of a round in which not all models had one."""
    rounds = min(len(model.seconds) for model in models)
    for model in models:
        del model.seconds[rounds:]


def trimmed_mean(model: TimedModel) -> float:
    """Return the mean seconds of a step over the turns, without the fastest and the slowest tenth of them.

    A median of short turns would leave out that every tenth step takes half as long again, which long runs don't.
    """
    dropped = min(math.ceil(_DROPPED * len(model.seconds)), (len(model.seconds) - 1) // 2)
    return statistics.fmean(sorted(model.seconds)[dropped : len(model.seconds) - dropped])


def steady(models: Sequence[TimedModel]) -> None:
    """Divide each turn's seconds by the speed of its round: by how much all models' turns in it took longer than usual.

    Other work on the machine comes and goes, and slows what is measured at the same time alike. What is usual are the
    quietest rounds where these are far from the others: there was other work during most of the measurement.
    """
    seconds = np.array([model.seconds for model in models])
    speeds = np.median(seconds / np.median(seconds, axis=1, keepdims=True), axis=0)
    quiet = float(np.sort(speeds)[min(max(1, round(_QUIET * len(speeds))), len(speeds) - 1)])  # not one round alone
    speeds /= quiet if quiet < _SLOWED else 1.0
    for model, own in zip(models, seconds / speeds, strict=True):
        model.seconds = own.tolist()


def spread(values: Sequence[float]) -> float:
    """Return the distance of the quartiles of ``values``, as a share of their median."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return (high - low) / middle
