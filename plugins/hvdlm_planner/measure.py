"""``plan --measure``: measures this machine with the ranks of this launch, and adds it to a hardware file."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from hvdlm.config import Config
from hvdlm.diagnostics.rank_errors import ending_all_ranks
from hvdlm.errors import HvdlmError
from hvdlm.io.launcher_env import launch_shape
from hvdlm.parallel.mesh import Mesh
from hvdlm.planning.gradient_work import work_of
from hvdlm.planning.hardware import Rates
from hvdlm.protocols.world import World
from hvdlm_planner import fitting, measured_collectives, measured_file, timed_record
from hvdlm_planner.calibrations import ALONE, config_of, layouts_of
from hvdlm_planner.habits import habits_of
from hvdlm_planner.layout_fit import fit_layouts
from hvdlm_planner.measured_file import Measurement
from hvdlm_planner.timed_record import Record, Timed
from hvdlm_planner.timed_steps import (
    Ranks,
    TimedModel,
    build,
    connect,
    drop_partial_round,
    of_all_ranks,
    spread,
    steady,
    take_turns,
    trimmed_mean,
    warm_up,
)

_TURN = 0.08  # seconds of a model's turn
_LEAST_ROUNDS = 4  # for which time is left when models are built
_LEAST_ALONE = 10  # first models of one rank, of which constants can be fitted
_FOR_MODELS = 0.6  # share of the time that collectives by themselves leave for models
_KNOWN = 0.01  # relative standard error of the models' seconds at which measuring ends
_RESERVE = 6.0  # seconds for the fit and the end of the processes
BUSY = "the machine is busy"
_NOISY, _USELESS = 0.15, 1.0  # spread of a model's turns: of a busy machine; of one whose figures say nothing
_UNBOUNDED = 1e15  # FLOPs or bytes per second of a kind of work whose seconds the fit found to be 0


class Progress:
    """What rank 0 prints, and the time that is left of ``seconds``."""

    def __init__(self, world: World, end: float) -> None:
        self._world = world
        self._end = end

    def say(self, text: str) -> None:
        """Print a line on rank 0."""
        if self._world.rank == 0:
            print(f"measure: {text}; {max(0.0, self._end - time.monotonic()):.0f} s are left", flush=True)

    def left(self) -> float:
        """Return the seconds that are left for measuring, the same on all ranks. All ranks call."""
        seconds: float = self._world.broadcast_object(self._end - time.monotonic())
        return seconds - _RESERVE


def main(config: Config, path: Path, seconds: float, rounds: int, most: int, steps: Path | None = None) -> None:
    """Measure with the ranks of this launch; rank 0 adds the result to the file at ``path``. All ranks call.

    Args:
        seconds: that the measurement may take.
        rounds: turns that each model has at most.
        most: models at most.
        steps: file for what is timed; None: it is not kept.

    Raises:
        HvdlmError: the machine is too busy for its figures to say anything, or the seconds are too few.
    """
    end = time.monotonic() + seconds
    size = launch_shape()[1]
    # A batch that any number of ranks divides: the models are those of the calibrations.
    config = replace(config, train=replace(config.train, batch_size=size, micro_batch_size=None))
    ranks = connect(config, meshes(size))
    with ending_all_ranks(ranks.world):
        base = replace(config, train=replace(config.train, threads=ranks.threads))
        progress = Progress(ranks.world, end)
        record = measure(ranks, base, progress, rounds, most)
        if steps is not None and ranks.world.rank == 0:
            timed_record.write(record, steps)
        noise = noise_of(record)
        if ranks.world.rank == 0:  # the others' cores make the fit faster
            add(fitted(record, noise, progress.say), path)


def fit_again(record: Path, path: Path) -> None:
    """Add what the steps in the file ``record`` say of their machine to the hardware file at ``path``."""
    timed = timed_record.read(record)
    add(fitted(timed, noise_of(timed), print), path)


def add(measurement: Measurement, path: Path) -> None:
    """Add a measurement to the file at ``path``, and print what it says."""
    measured_file.add(measurement, path)
    print("\n".join(summary(measurement)), f"written: {path}", sep="\n", flush=True)


def meshes(size: int) -> list[Mesh]:
    """Return the layouts of ``size`` ranks that are measured beside data parallelism."""
    return [Mesh(size // 2, 2, 1), Mesh(size // 2, 1, 2)] if size % 2 == 0 else []


def measure(ranks: Ranks, base: Config, progress: Progress, rounds: int, most: int) -> Record:
    """Return what the ranks of this launch time until the seconds are over. All ranks call."""
    world, size = ranks.world, ranks.world.size
    progress.say(f"{size} rank(s) with {ranks.threads} thread(s) each, {ranks.framework.name}")
    tables = []
    if size > 1:
        kept = _FOR_MODELS * progress.left()
        tables = measured_collectives.measure(ranks, lambda: progress.left() > kept)
        progress.say("collectives are measured")
    with _without_collections():
        models = _built(ranks, base, progress, most)
    _take_turns([timed.model for timed in models], world, progress, rounds)
    alone = [timed.model for timed in models if timed.kind == timed_record.ALONE]
    return Record(ranks.framework.name, size, world.local_size, tables, models, _copy_rate(alone))


def _built(ranks: Ranks, base: Config, progress: Progress, most: int) -> list[Timed]:
    """Return the models that have done their first steps, ``most`` at most, and as many as the time allows.

    Raises:
        HvdlmError: it allows too few.
    """
    world = ranks.world
    least = _LEAST_ALONE if world.size == 1 else _LEAST_ALONE + 1
    planned = _planned(base, world.size)[: max(least, most)]
    alone, models, longest, turns = _alone(world), [], 0.0, [2 * _TURN]
    for kind, config, vocab in planned:
        before = progress.left()
        # Of the next model, as much as of the longest one so far.
        if before < _LEAST_ROUNDS * (sum(turns) + max(turns)) + longest:
            break
        model = build(config, vocab, alone if kind == timed_record.ALONE else world, ranks.framework)
        warm_up([model], world, _TURN)
        models.append(Timed(kind, model))
        turns.append(model.turn_seconds)
        longest = max(longest, before - progress.left())
    if len(models) < least:
        raise HvdlmError(
            f"the machine can't be measured in so few seconds: of {len(planned)} small models, only {len(models)} "
            f"could be started, and {least} are needed; give more --seconds, or end other work on it."
        )
    left_out = f", {len(planned) - len(models)} are left out for want of time" if len(models) < len(planned) else ""
    progress.say(f"{len(models)} models are built{left_out}")
    return models


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Collect no garbage: each collection goes through all models' graphs, a seventh of the time to build them."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _planned(base: Config, size: int) -> list[tuple[str, Config, int]]:
    """Return (kind, configuration, vocabulary) of the models to time, those first that all others need."""
    alone = [(timed_record.ALONE, config_of(base, one), one.vocab) for one in ALONE]
    together = layouts_of(base, size) if size > 1 else []
    kinds = len({kind for kind, _, _ in together})  # of each, the first layout comes before all second ones
    return [*alone[:_LEAST_ALONE], *together[:kinds], *alone[_LEAST_ALONE:], *together[kinds:]]


def noise_of(record: Record) -> float:
    """Return the spread of the turns of half of the models.

    Raises:
        HvdlmError: the machine was too busy for its figures to say anything.
    """
    noise = _middle([spread(model.seconds) for model in record.of(timed_record.ALONE)])
    if noise > _USELESS:
        raise HvdlmError(
            f"the machine is too busy to be measured: half of a model's turns differ by {100 * noise:.0f}% of their "
            "median; end other work on it, and measure again."
        )
    return noise


def fitted(record: Record, noise: float, say: Callable[[str], None]) -> Measurement:
    """Return the machine by what was timed."""
    if noise > _NOISY:
        differ = f"half of a model's turns differ by {100 * noise:.0f}%"
        say(f"{BUSY}: {differ}; predictions suffer: measure again when nothing else runs on it")
    steady([timed.model for timed in record.models])
    rates, error = fitted_rates(record.of(timed_record.ALONE), record)
    notes = measured_file.about(record.framework, record.ranks, noise, error)
    copied = record.save_bytes_per_second
    new = Measurement(rates, record.collectives, record.ranks_per_node, record.link, copied, notes)
    layouts = [timed for timed in record.models if timed.kind != timed_record.ALONE]
    if not layouts:
        return new
    say("fitting what communication costs")
    rates, tables = fit_layouts(layouts, measured_file.merged(None, new), rates)
    return replace(new, rates=rates, collectives=tables)


def _alone(world: World) -> World:
    """Return a world of this rank alone, on the same device."""
    from hvdlm_backends.local import LocalWorld

    return LocalWorld(world.local_rank)


def _take_turns(models: Sequence[TimedModel], world: World, progress: Progress, most: int) -> None:
    """Time the models in rounds until their seconds are known well, or the time is over. All ranks call."""
    rounds, before = 0, progress.left()
    while rounds < most and take_turns(models, world, rounds, lambda: progress.left() > 0):
        rounds += 1
        left = progress.left()
        longest, before = before - left, left
        if left < longest or (rounds >= _LEAST_ROUNDS and world.broadcast_object(_standard_error(models) <= _KNOWN)):
            break
    if rounds == 0:
        raise HvdlmError("the seconds are over before every model has had its turn: give more --seconds.")
    drop_partial_round(models)
    of_all_ranks(models, world)
    progress.say(f"{rounds} rounds of {len(models)} models are timed")


def _standard_error(models: Sequence[TimedModel]) -> float:
    """Return the relative standard error of half of the models' figures.

    That of a median of n normally distributed values, whose quartiles are 1.35 standard deviations apart.
    """
    return _middle([1.25 * spread(m.seconds) / 1.35 / math.sqrt(len(m.seconds)) for m in models])


def fitted_rates(models: Sequence[TimedModel], record: Record) -> tuple[Rates, float]:
    """Return the rates that fit the seconds of the models' steps best, and the median of their relative errors."""
    precision = models[0].config.train.precision
    item = 4 if precision == "fp32" else 2
    works = [
        work_of(m.config, m.spec, m.mesh, 0, habits_of(m.config), fused=m.config.train.compile is True) for m in models
    ]
    system = [fitting.amounts(work, item) for work in works if work is not None]
    seconds = [trimmed_mean(model) for model in models]
    copied = 0.5 / record.save_bytes_per_second  # which is read and written
    constants = fitting.regularised_fit(system, seconds, copied, _standard_error(models))
    error = _middle([abs(error) for error in fitting.errors(system, constants, seconds)])
    return rates_of(constants, record.framework, precision, record.ranks_per_node), error


def rates_of(constants: Sequence[float], framework: str, precision: str, ranks: int) -> Rates:
    """Return rates from the constants of ``fitting.KINDS``."""
    seconds = dict(zip(fitting.KINDS, constants, strict=True))
    flops = _inverse(seconds["product_flops"])
    return Rates(
        product_flops_per_second=flops,
        memory_bytes_per_second=_inverse(seconds["bytes"]),
        product_bytes_per_second=_inverse(seconds["product_bytes"]),
        attention_efficiency=_inverse(seconds["attention_flops"]) / flops,
        update_seconds_per_element=(seconds["updates"],),
        loss_seconds_per_score=seconds["scores"],
        seconds_per_operation=seconds["operations"],
        seconds_per_micro_batch=seconds["micro_batches"],
        seconds_per_step=seconds["steps"],
        framework=framework,
        precision=precision,
        ranks=ranks,
    )


def _inverse(seconds: float) -> float:
    return min(_UNBOUNDED, 1.0 / seconds) if seconds > 0 else _UNBOUNDED


def _copy_rate(models: Sequence[TimedModel]) -> float:
    """Return the bytes per second at which a save copies the state of the largest model."""
    model = max(models, key=lambda m: m.spec.parameters)
    began = time.perf_counter()
    state = model.trainable.state()
    return sum(array.nbytes for array in state.values()) / (time.perf_counter() - began)


def _middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def summary(measurement: Measurement) -> Iterator[str]:
    """Yield lines about a measurement."""
    rates = measurement.rates
    products = rates.product_flops_per_second / 1e9
    yield (
        f"{rates.framework} in {rates.precision}, {rates.ranks} rank(s) on a node: products {products:,.1f} GFLOP/s, "
        f"{1e6 * rates.seconds_per_operation:.1f} us an operation, {1e3 * rates.seconds_per_step:.2f} ms a step"
    )
    for name, rate in rates.compressors.items():
        yield f"{name}: {1e9 * rate.seconds_per_element:.2f} ns an element"
    for table in measurement.collectives:
        size, seconds = table.bytes[-1], table.seconds[-1]
        yield (
            f"{table.operation} of {table.ranks} ranks ({table.link}): {1e6 * table.seconds[0]:.0f} us for "
            f"{table.bytes[0]:.0f} bytes, {size / seconds / 1e9:.3f} GB/s for {size:,.0f}"
        )
    for kind, note in measurement.notes.items():
        yield f"{kind}: {note}"
