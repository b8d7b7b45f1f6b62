"""The predicted seconds of a step, by cause, from its work and a machine's rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

from hvdlm.config import Config
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.mesh import Mesh
from hvdlm.parallel.pipeline_stages import cut_into_stages
from hvdlm.planning.closed_forms import Habits
from hvdlm.planning.gradient_work import work_of
from hvdlm.planning.hardware import OUTER_UPDATE, Hardware
from hvdlm.planning.overlap import Slowdown, Task, run
from hvdlm.planning.pipeline_time import simulate_pipeline
from hvdlm.planning.rates import Computation, Network
from hvdlm.planning.same import Same
from hvdlm.planning.work import Bucket, Collective, Pass, Work


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step of the slowest rank, by cause.

    Attributes:
        compute: forward and backward passes and the update.
        communication: for which computation waits.
        bubble: for which a pipeline stage waits for others.
        data: waiting for batches.
        save: for which a save pauses training, per step.
        hidden: communication behind computation, not in the sum.
    """

    compute: float
    communication: float = 0.0
    bubble: float = 0.0
    data: float = 0.0
    save: float = 0.0
    hidden: float = 0.0

    @property
    def seconds(self) -> float:
        """The sum of all parts."""
        return self.compute + self.communication + self.bubble + self.data + self.save


@dataclass(frozen=True)
class StageTime:
    """Seconds of one pipeline stage's rank, the input of schedules and simulations.

    Attributes:
        forward, backward: of one micro-batch, collectives that block included.
        last_backward: of the last micro-batch, slowed down by the buckets' collectives.
        blocked: of forward and backward together, in collectives between tensor ranks.
        exposed: of gradients' collectives, after the last backward pass.
        hidden: of gradients' collectives, behind the backward pass.
        update: of the optimizer and of what a step computes beside its passes.
        after: collectives after the gradients, and the share of rounds (local SGD, DiLoCo).
        send: of one micro-batch's activations to the next stage.
        buckets: of each bucket's collectives, beside the backward pass and after it.
        shares: of the rank's virtual stages in the seconds of its passes.
    """

    forward: float
    backward: float
    last_backward: float
    blocked: float
    exposed: float
    hidden: float
    update: float
    after: float
    send: float
    buckets: tuple[float, ...] = ()
    shares: tuple[float, ...] = (1.0,)


def predict_time(
    config: Config,
    spec: ModelSpec,
    mesh: Mesh,
    hardware: Hardware,
    moments: int | None = None,
    habits: Habits | None = None,
) -> StepTime | None:
    """Return the seconds of a step, or None for an architecture whose work is unknown.

    Args:
        moments: state vectors of the optimizer; None: those of a built-in ``train.optimizer``.
        habits: what the framework does in another way than PyTorch.
    """
    config = resolved(config, hardware)
    works = stage_works(config, spec, mesh, hardware, moments, habits)
    if works is None:
        return None
    computation, network = machine_of(config, mesh, hardware)
    data = works[0].tokens * works[0].micro_batches * hardware.data_seconds_per_token
    return step_time(works, config.parallel.schedule, computation, network, data, config.data.prefetch > 0)


def stage_works(
    config: Config, spec: ModelSpec, mesh: Mesh, hardware: Hardware, moments: int | None, habits: Habits | None
) -> list[Work] | None:
    """Return the work of every stage's first tensor rank; stages with equal work share one object."""
    fused = compiles(config, spec, hardware, habits)
    first = equal_stages(Same(spec), mesh.pipeline, config.parallel.virtual_stages)
    ranks = {stage: mesh.rank_of(stage) for stage in first}
    works = {stage: work_of(config, spec, mesh, rank, habits, moments, fused) for stage, rank in ranks.items()}
    known = [work for work in map(works.get, first) if work is not None]
    return known if len(known) == len(first) else None


def machine_of(config: Config, mesh: Mesh, hardware: Hardware) -> tuple[Computation, Network]:
    """Return the rates of the ranks of ``mesh`` for a configuration whose precision is resolved."""
    computation = _computation(Same(hardware), config.framework, config.train.precision, mesh.size)
    return computation, _network(Same(hardware), mesh, config.framework)


@lru_cache(maxsize=16)
def _computation(hardware: Same[Hardware], framework: str, precision: str, size: int) -> Computation:
    per_node = min(hardware.value.ranks_per_node, size)
    return Computation(hardware.value, framework, precision, per_node, size)


@lru_cache(maxsize=256)
def _network(hardware: Same[Hardware], mesh: Mesh, framework: str) -> Network:
    return Network(hardware.value, mesh, framework)


@lru_cache(maxsize=256)
def equal_stages(spec: Same[ModelSpec], pipeline: int, virtual: int) -> tuple[int, ...]:
    """Return for each rank's stage the first one that has the same work: as many layers, and embedding and head alike.

    ``virtual``: virtual stages of a rank.
    """
    cut = cut_into_stages(spec.value, pipeline * virtual)
    kinds = [
        [(len(stage.layers), stage.first, stage.last) for stage in cut[rank::pipeline]] for rank in range(pipeline)
    ]
    return tuple(kinds.index(kind) for kind in kinds)


def resolved(config: Config, hardware: Hardware) -> Config:
    """Return ``config`` with the precision that ``auto`` stands for on this machine: bf16 where its rates have it."""
    if config.train.precision != "auto":
        return config
    has_bf16 = any(rates.precision == "bf16" for rates in hardware.rates) and hardware.device == "gpu"
    return replace(config, train=replace(config.train, precision="bf16" if has_bf16 else "fp32"))


def compiles(config: Config, spec: ModelSpec, hardware: Hardware, habits: Habits | None) -> bool:
    """Return whether element-wise operations are compiled: asked for, or by default."""
    asked = config.train.compile
    if isinstance(asked, bool):
        return asked
    if config.parallel.zero == 3:
        return False
    return (habits or Habits()).compiles and hardware.device == "gpu" and spec.kind == "gpt"


def step_time(
    works: Sequence[Work],
    schedule: str,
    computation: Computation,
    network: Network,
    data_seconds: float = 0.0,
    prefetch: bool = True,
    interleaved: int = 1,
) -> StepTime:
    """Return the seconds of a step of pipeline stages with these works, first to last.

    Args:
        data_seconds: of making one rank's batch.
        prefetch: whether it is made during the step before.
        interleaved: virtual stages on a rank that the works don't tell apart; they divide the bubble (Narayanan et al.
            2021, section 2.2).
    """
    times = {id(work): stage_time(work, computation, network) for work in {id(work): work for work in works}.values()}
    stages = [times[id(work)] for work in works]
    count = works[0].micro_batches
    factor = computation.rates.bubble_factor
    ends = simulate_pipeline(_by_themselves(stages, network) if factor is None else stages, schedule, count)
    busy = [count * (stage.forward + stage.backward) + stage.last_backward - stage.backward for stage in stages]
    whole = max(end + stage.exposed for end, stage in zip(ends, stages, strict=True))
    slowest = max(range(len(stages)), key=lambda index: busy[index] + stages[index].exposed)
    stage = stages[slowest]
    bubble = max(0.0, whole - busy[slowest] - stage.exposed) / interleaved * (1.0 if factor is None else factor)
    update, after = max(s.update for s in stages), max(s.after for s in stages)
    blocked = count * stage.blocked
    compute = busy[slowest] - blocked + update
    communication = blocked + stage.exposed + after
    done = compute + communication + bubble
    waiting = max(0.0, data_seconds - done) if prefetch else data_seconds
    saved = works[slowest].saved_bytes
    rate = network.hardware.save_bytes_per_second
    return StepTime(compute, communication, bubble, waiting, saved / rate if rate else 0.0, stage.hidden)


def _by_themselves(stages: Sequence[StageTime], network: Network) -> Sequence[StageTime]:
    """Return the stages at the speed of ranks whose node's cores are not all taken: a rank that waits leaves its core.

    Rates of more ranks than cores are those of ranks that all compute at once.
    """
    cores, ranks = network.hardware.cores_per_node, network.per_node
    if not 0 < cores < ranks:
        return stages
    share = cores / ranks
    return [
        replace(s, forward=share * s.forward, backward=share * s.backward, last_backward=share * s.last_backward)
        for s in stages
    ]


def stage_time(work: Work, computation: Computation, network: Network) -> StageTime:
    """Return the seconds of one stage."""
    forward = [_task(segment.forward, computation, network) for segment in work.segments]
    backward = [_task(segment.backward, computation, network) for segment in reversed(work.segments)]
    slowdown = slowdown_of(computation, network)
    without = run(forward, slowdown), run(backward, slowdown)
    first = 0.0
    if work.first_gathers:
        gathering = zip(forward, work.first_gathers, strict=True)
        tasks = [replace(task, gathers=network.seconds(gather)) for task, gather in gathering]
        first = run(tasks, slowdown).end - without[0].end
    alone = [sum(map(network.seconds, bucket.collectives)) for bucket in work.buckets]
    last = run(_with_buckets(backward, work, alone, computation, network), slowdown)
    every = last if work.scatters_every else without[1]
    blocked = sum(task.blocking for task in [*forward, *backward])
    # Parameters' gathers that computation waits for (FSDP).
    blocked += without[0].waited + without[1].waited
    rounds = sum(network.seconds(collective) for collective in work.rounds)
    if work.streams:  # a step's share of them travels beside the passes of a step
        rounds = max(0.0, rounds - work.micro_batches * (without[0].end + without[1].end))
    after = sum(network.seconds(collective) for collective in work.after)
    after += sum(network.seconds(collective) for bucket in work.buckets for collective in bucket.later)
    update = computation.update(work.update_elements, work.moments, work.update_bytes)
    update += sum(p.count * computation.product(p.m, p.k, p.n) for p in work.update_products)
    update += _outer_update(work, computation) + computation.overhead(work.micro_batches)
    update += computation.rates.seconds_per_gathered_element * work.gathered
    update += computation.rates.seconds_per_scattered_element * work.scattered
    scattered = (work.micro_batches - 1) * last.exposed if work.scatters_every else 0.0
    staged = computation.sharing.overhead * computation.rates.pass_seconds if work.send_bytes else 0.0
    staged *= max(1, len(work.chunks))
    return StageTime(
        without[0].end + staged,
        every.end + staged,
        last.end + staged,
        blocked,
        last.exposed + scattered + first,
        last.hidden + without[0].hidden,
        update,
        after + rounds,
        message_seconds(work, network),
        _in_step(work, backward, last.then, alone),
        _shares(work, forward, backward),
    )


def _shares(work: Work, forward: Sequence[Task], backward: Sequence[Task]) -> tuple[float, ...]:
    """Return the shares of virtual stages in the seconds of forward and backward tasks (the latter last to first)."""
    if not work.chunks:
        return (1.0,)
    pairs = zip(forward, reversed(backward), strict=True)
    seconds = [a.seconds + a.blocking + b.seconds + b.blocking for a, b in pairs]
    ends = list(accumulate(work.chunks))
    return tuple(sum(seconds[end - n : end]) / sum(seconds) for n, end in zip(work.chunks, ends, strict=True))


def _in_step(work: Work, backward: Sequence[Task], then: Sequence[float], alone: Sequence[float]) -> tuple[float, ...]:
    """Return the seconds of each bucket's collectives in a step, of which they take ``alone`` by themselves.

    ``then``: of all that are started after each task.
    """
    whole = [task.then for task in backward]
    tasks = [len(backward) - 1 - bucket.ready for bucket in work.buckets]
    for index, seconds in zip(tasks, alone, strict=True):
        whole[index] += seconds
    pairs = zip(tasks, alone, strict=True)
    return tuple(seconds * then[index] / whole[index] if whole[index] else 0.0 for index, seconds in pairs)


def slowdown_of(computation: Computation, network: Network) -> Slowdown:
    """Return how computation and collectives slow each other down."""
    rates = computation.rates
    return Slowdown(rates.overlap_slowdown or network.hardware.overlap_slowdown, rates.collective_slowdown)


def _outer_update(work: Work, computation: Computation) -> float:
    """Return the share of a round's outer update that falls on a step."""
    rate = computation.rates.compressors.get(OUTER_UPDATE)
    if rate is None:
        return computation.bytes(work.rounds_bytes)
    return rate.seconds_per_element * work.rounds_bytes / 12 + rate.seconds_per_bucket * work.rounds_share


def message_seconds(work: Work, network: Network) -> float:
    """Return the seconds until the next stage has a micro-batch's activations."""
    return network.seconds(Collective("send", work.send_bytes, "pipeline")) if work.send_bytes else 0.0


def blocked_seconds(one: Pass, computation: Computation, network: Network) -> float:
    """Return the seconds for which a pass waits for collectives, and by which those beside its products delay these."""
    seconds = sum(map(network.seconds, one.blocking))
    blocked = _waited(seconds, sum(collective.count for collective in one.blocking), computation)
    for beside in one.overlapped:
        products = computation.seconds(Pass(beside.products))
        sent = _waited(network.seconds(beside.collective), beside.collective.count, computation)
        ran = run([Task(0.0, 0.0, then=sent), Task(products, 0.0)], slowdown_of(computation, network))
        blocked += ran.end + ran.exposed - products
    return blocked


def _waited(seconds: float, count: float, computation: Computation) -> float:
    """Return the seconds of ``count`` collectives, ``seconds`` by themselves, for a rank that waits for them."""
    return computation.rates.blocking_factor * seconds + computation.rates.blocking_seconds * count


def _task(one: Pass, computation: Computation, network: Network) -> Task:
    """Return the task of a segment's pass."""
    gathers, then = (sum(map(network.seconds, group)) for group in (one.gathers, one.scatters))
    return Task(computation.seconds(one), blocked_seconds(one, computation, network), gathers, then)


def _with_buckets(
    tasks: list[Task], work: Work, alone: Sequence[float], computation: Computation, network: Network
) -> list[Task]:
    """Return backward tasks (last segment first) that start the collectives of the buckets they complete.

    ``alone``: seconds of each bucket's collectives by themselves.
    """
    result = list(tasks)
    for bucket, seconds in zip(work.buckets, alone, strict=True):
        index = len(tasks) - 1 - bucket.ready
        task = result[index]
        compress = _compression(bucket, computation, network)
        result[index] = replace(task, seconds=task.seconds + compress, then=task.then + seconds)
    return result


def _compression(bucket: Bucket, computation: Computation, network: Network) -> float:
    """Return the seconds of compressing and decompressing a bucket."""
    rate = computation.rates.compressors.get(bucket.algorithm, network.hardware.compressors.get(bucket.algorithm))
    if rate is None or not bucket.compressed:
        return computation.bytes(24.0 * bucket.compressed + 8.0 * bucket.received)
    per_element = rate.seconds_per_element * bucket.compressed + rate.seconds_per_received_element * bucket.received
    overhead = rate.seconds_per_bucket + rate.seconds_per_tensor * bucket.tensors
    return computation.sharing.memory * per_element + computation.sharing.overhead * overhead
