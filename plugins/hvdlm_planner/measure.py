"""``plan --measure``: measures this machine with the ranks of this launch, and adds it to a hardware file."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
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
from hvdlm_planner import fitting, measured_collectives, measured_file
from hvdlm_planner.calibrations import ALONE, config_of, layouts_of
from hvdlm_planner.layout_fit import Layout, fit_layouts
from hvdlm_planner.measured_file import Measurement
from hvdlm_planner.timed_steps import Ranks, TimedModel, build, connect, median, spread, steady, take_turns, warm_up

SECONDS = 60.0  # that a measurement may take
_TURN = 0.05  # seconds of a model's turn
_ROUNDS = (3, 9)  # fewest and most turns of a model
_RESERVE = 5.0  # seconds for the fit, and for a last round that takes longer than the one before
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
            print(f"measure: {text}", flush=True)

    def left(self) -> float:
        """Return the seconds that are left, the same on all ranks. All ranks call."""
        seconds: float = self._world.broadcast_object(self._end - time.monotonic())
        return seconds


def main(config: Config, path: Path, seconds: float = SECONDS) -> None:
    """Measure with the ranks of this launch; rank 0 adds the result to the file at ``path``. All ranks call.

    Raises:
        HvdlmError: the machine is too busy for its figures to say anything.
    """
    end = time.monotonic() + seconds
    size = launch_shape()[1]
    # A batch that any number of ranks divides: the models are those of the calibrations.
    config = replace(config, train=replace(config.train, batch_size=size, micro_batch_size=None))
    ranks = connect(config, meshes(size))
    with ending_all_ranks(ranks.world):
        base = replace(config, train=replace(config.train, threads=ranks.threads))
        measurement = measure(ranks, base, Progress(ranks.world, end))
        if ranks.world.rank == 0:
            measured_file.add(measurement, path)
            print("\n".join(summary(measurement)), f"written: {path}", sep="\n", flush=True)


def meshes(size: int) -> list[Mesh]:
    """Return the layouts of ``size`` ranks that are measured beside data parallelism."""
    return [Mesh(size // 2, 2, 1), Mesh(size // 2, 1, 2)] if size % 2 == 0 else []


def measure(ranks: Ranks, base: Config, progress: Progress) -> Measurement:
    """Return what the ranks of this launch measure. All ranks call."""
    world, size = ranks.world, ranks.world.size
    progress.say(f"{size} rank(s) with {ranks.threads} thread(s) each, {ranks.framework.name}")
    tables = measured_collectives.measure(ranks) if size > 1 else []
    if tables:
        progress.say("collectives are measured")
    alone = [_prepared(config_of(base, one), one.vocab, _alone(world), ranks) for one in ALONE]
    progress.say(f"{len(alone)} models of one rank are built")
    together = layouts_of(base, size) if size > 1 else []
    layouts = [Layout(kind, _prepared(config, vocab, world, ranks)) for kind, config, vocab in together]
    if layouts:
        progress.say(f"{len(layouts)} models of {size} ranks are built")
    _take_turns([*alone, *(layout.model for layout in layouts)], world, progress)
    copied = _copy_rate(alone)
    noise = _middle([spread(model.seconds) for model in alone])
    steady([*alone, *(layout.model for layout in layouts)])
    rates, error = fitted_rates(alone, ranks)
    if noise > _USELESS:
        raise HvdlmError(
            f"the machine is too busy to be measured: half of a model's turns differ by {100 * noise:.0f}% of their "
            "median; end other work on it, and measure again."
        )
    if noise > _NOISY:
        progress.say(f"the machine is busy: half of a model's turns differ by {100 * noise:.0f}%; predictions suffer")
    notes = measured_file.about(ranks.framework.name, size, noise, error)
    link = "node" if world.local_size == size else "network"
    new = Measurement(rates, tables, world.local_size, link, copied, notes)
    if not layouts:
        return new
    progress.say("fitting what communication costs")
    fitted, scaled = fit_layouts(layouts, measured_file.merged(None, new), rates)
    return replace(new, rates=fitted, collectives=scaled)


def _alone(world: World) -> World:
    """Return a world of this rank alone, on the same device."""
    from hvdlm_backends.local import LocalWorld

    return LocalWorld(world.local_rank)


def _prepared(config: Config, vocab: int, world: World, ranks: Ranks) -> TimedModel:
    """Return a model that has done its first steps."""
    model = build(config, vocab, world, ranks.framework)
    warm_up([model], ranks.world, _TURN)
    return model


def _take_turns(models: Sequence[TimedModel], world: World, progress: Progress) -> None:
    """Time the models in rounds, as many as the time allows. All ranks call."""
    for number in range(_ROUNDS[1]):
        before = progress.left()
        take_turns(models, world, 1)
        left = progress.left()
        progress.say(f"round {number + 1} of at most {_ROUNDS[1]}, {max(0.0, left):.0f} s left")
        if number + 1 >= _ROUNDS[0] and left - _RESERVE < before - left:
            break


def fitted_rates(models: Sequence[TimedModel], ranks: Ranks) -> tuple[Rates, float]:
    """Return the rates that fit the seconds of the models' steps best, and the median of their relative errors."""
    precision = models[0].config.train.precision
    item = 4 if precision == "fp32" else 2
    works = [work_of(m.config, m.spec, m.mesh, 0, fused=m.config.train.compile is True) for m in models]
    system = [fitting.amounts(work, item) for work in works if work is not None]
    seconds = [median(model) for model in models]
    constants = fitting.fit(system, seconds)
    error = _middle([abs(error) for error in fitting.errors(system, constants, seconds)])
    return rates_of(constants, ranks.framework.name, precision, ranks.world.local_size), error


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
