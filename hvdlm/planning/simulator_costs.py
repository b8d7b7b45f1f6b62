"""The costs of a step as the simulator needs them: seconds of passes, collectives and messages, by pipeline stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

from hvdlm.config import Config
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.mesh import Mesh
from hvdlm.planning.closed_forms import Habits
from hvdlm.planning.gradient_work import LOCAL_EXCHANGES
from hvdlm.planning.hardware import Hardware
from hvdlm.planning.rates import Computation, Network
from hvdlm.planning.step_time import blocked_seconds, message_seconds, resolved, stage_time, stage_works
from hvdlm.planning.work import Collective, Work

_MOST_BUCKETS = 64  # of a stage; more are joined to as many, each ready when its last one is


class Bucket(NamedTuple):
    """A bucket of gradients: ``ready`` after this fraction of the backward pass; ``seconds`` of its collective."""

    ready: float
    seconds: float


@dataclass(frozen=True)
class StageCosts:
    """Seconds that a rank of one pipeline stage takes without any disturbance.

    Attributes:
        forward, backward: computing a pass of one micro-batch.
        last_backward: computing the backward passes that send buckets, which compress them and are slowed down by their
            collectives; None: as ``backward``.
        tensor_forward, tensor_backward: the collectives of tensor parallelism within such a pass.
        buckets: in the order in which the backward pass finishes them; empty with one data rank.
        update: the optimizer.
        gather: gathering the updated parameters (ZeRO); 0: there is nothing to gather.
        round: summing the parameter differences of local SGD or DiLoCo.
        shares: of the rank's virtual stages (its chunks) in these passes, of which each does its part.
    """

    forward: float
    backward: float
    tensor_forward: float = 0.0
    tensor_backward: float = 0.0
    buckets: tuple[Bucket, ...] = ()
    update: float = 0.0
    gather: float = 0.0
    round: float = 0.0
    last_backward: float | None = None
    shares: tuple[float, ...] = (1.0,)

    @property
    def backward_with_buckets(self) -> float:
        """Computing a backward pass that sends buckets."""
        return self.backward if self.last_backward is None else self.last_backward

    def buckets_of(self, chunk: int) -> list[Bucket]:
        """Return the buckets that the backward pass of ``chunk`` completes, ready after a fraction of it."""
        before = sum(self.shares[chunk + 1 :])  # the last chunk is the first
        after = before + self.shares[chunk]
        first, last = chunk + 1 == len(self.shares), chunk == 0
        of_chunk = [b for b in self.buckets if (first or b.ready > before) and (last or b.ready <= after)]
        return [Bucket(min(1.0, max(0.0, (b.ready - before) / self.shares[chunk])), b.seconds) for b in of_chunk]


@dataclass(frozen=True)
class StepCosts:
    """The costs of a step, and how its ranks depend on each other.

    Attributes:
        mesh: the ranks.
        stages: costs by pipeline stage.
        micro_batches: of a rank's step.
        schedule: pipeline schedule, 1f1b or gpipe.
        data: seconds of waiting for the batch.
        message: seconds of sending a micro-batch's activations, or their gradient, to the neighbouring stage.
        metrics, tied, norm, vote: seconds of the sums of metrics (data group), tied embeddings (first and last stage),
            gradient norm (copy of the model) and votes (all ranks).
        every: steps between synchronisations of local SGD and DiLoCo; 1: gradients are summed at every step.
        warmup: first steps whose gradients are summed although ``every`` is more than 1.
        every_micro_batch: whether every backward pass sends its buckets (ZeRO-2), not the last one alone.
    """

    mesh: Mesh
    stages: tuple[StageCosts, ...]
    micro_batches: int = 1
    schedule: str = "1f1b"
    data: float = 0.0
    message: float = 0.0
    metrics: float = 0.0
    tied: float = 0.0
    norm: float = 0.0
    vote: float = 0.0
    every: int = 1
    warmup: int = 0
    every_micro_batch: bool = False

    def sums_gradients(self, step: int) -> bool:
        """Return whether the data groups sum the gradients of ``step``, counted from 0."""
        return self.every == 1 or step < self.warmup

    def ends_round(self, step: int, steps: int) -> bool:
        """Return whether the parameters are averaged at the end of ``step`` of ``steps``."""
        return not self.sums_gradients(step) and ((step + 1) % self.every == 0 or step + 1 == steps)

    def computing(self, steps: int) -> float:
        """Return the seconds that an undisturbed rank computes in ``steps`` steps, the mean over the stages."""
        sums = sum(self.sums_gradients(step) for step in range(steps)) if self.mesh.data > 1 else 0
        sending = sums * (self.micro_batches if self.every_micro_batch else 1)
        seconds = 0.0
        for stage in self.stages:
            seconds += steps * (self.micro_batches * (stage.forward + stage.backward) + stage.update)
            seconds += sending * (stage.backward_with_buckets - stage.backward)
        return seconds / len(self.stages)


def step_costs(
    config: Config,
    spec: ModelSpec,
    mesh: Mesh,
    hardware: Hardware,
    moments: int | None = None,
    habits: Habits | None = None,
) -> tuple[StepCosts, float | None] | None:
    """Return the costs of a step of ranks of mean speed, and the seconds for which a save pauses training.

    None for an architecture whose work is unknown, and for the seconds of a save where the hardware has no such rate.
    ``moments``, ``habits``: as in ``predict_time``.
    """
    config = resolved(config, hardware)
    config = replace(config, checkpoint=replace(config.checkpoint, every=1))  # its work is that of a whole save
    works = stage_works(config, spec, mesh, hardware, moments, habits)
    if works is None:
        return None
    per_node = min(hardware.ranks_per_node, mesh.size)
    computation = Computation(hardware, config.framework, config.train.precision, per_node)
    network = Network(hardware, mesh, config.framework)
    options, first = config.communication, works[0]
    local = options.exchange in LOCAL_EXCHANGES and mesh.data > 1
    stages = tuple(_stage(work, computation, network, options.local.steps) for work in works)
    data = first.tokens * first.micro_batches * hardware.data_seconds_per_token
    costs = StepCosts(
        mesh,
        stages,
        first.micro_batches,
        config.parallel.schedule,
        data=0.0 if config.data.prefetch else data,
        message=message_seconds(first, network),
        metrics=_after(first, network, "all_reduce", "data"),
        tied=_after(first, network, "all_reduce", "ends"),
        norm=_after(first, network, "all_reduce", "model"),
        vote=sum(network.seconds(Collective("all_reduce", 56.0, axis)) for axis in ("data", "model")),
        every=options.local.steps if local else 1,
        warmup=options.local.warmup if local else 0,
        every_micro_batch=first.scatters_every,
    )
    rate = hardware.save_bytes_per_second
    return costs, max(work.saved_bytes for work in works) / rate if rate else None


def _stage(work: Work, computation: Computation, network: Network, every: int) -> StageCosts:
    """Return the costs of a stage; the share of rounds in each step becomes whole rounds again."""
    time = stage_time(work, computation, network)
    forward = sum(blocked_seconds(segment.forward, computation, network) for segment in work.segments)
    backward = sum(blocked_seconds(segment.backward, computation, network) for segment in work.segments)
    return StageCosts(
        time.forward - forward,
        (time.last_backward if work.scatters_every else time.backward) - backward,
        forward,
        backward,
        _buckets(work, time.buckets, computation, network),
        time.update,
        _after(work, network, "all_gather", "data"),
        every * sum(network.seconds(collective) for collective in work.rounds),
        time.last_backward - backward,
        time.shares,
    )


def _buckets(work: Work, taken: Sequence[float], computation: Computation, network: Network) -> tuple[Bucket, ...]:
    """Return a stage's buckets, ready by the seconds of the segments without any slowdown; ``taken``: their seconds."""
    seconds = [
        computation.seconds(segment.backward) + blocked_seconds(segment.backward, computation, network)
        for segment in reversed(work.segments)
    ]
    ends = list(accumulate(seconds))
    buckets = [
        Bucket(ends[-1 - bucket.ready] / ends[-1], seconds) for bucket, seconds in zip(work.buckets, taken, strict=True)
    ]
    return tuple(_joined(buckets))


def _joined(buckets: Sequence[Bucket]) -> list[Bucket]:
    """Return at most ``_MOST_BUCKETS`` buckets: of consecutive ones the latest readiness and the sum of seconds."""
    size = max(1, -(-len(buckets) // _MOST_BUCKETS))
    groups = [buckets[first : first + size] for first in range(0, len(buckets), size)]
    return [Bucket(max(b.ready for b in group), sum(b.seconds for b in group)) for group in groups]


def _after(work: Work, network: Network, operation: str, axis: str) -> float:
    """Return the seconds of one kind of the collectives that follow the gradients."""
    return sum(network.seconds(c) for c in work.after if c.operation == operation and c.axis == axis)
