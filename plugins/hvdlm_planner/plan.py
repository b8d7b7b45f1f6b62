"""The predicted memory, communication and seconds of every rank as text: ``python -m hvdlm plan [OPTIONS]``."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.mesh import Mesh
from hvdlm.planning.closed_forms import predict_costs
from hvdlm.planning.gradient_work import kept_bytes, unknown, work_of
from hvdlm.planning.hardware import Hardware
from hvdlm.planning.memory_fit import Fit, fit
from hvdlm.planning.step_time import StepTime, predict_time
from hvdlm.protocols.types import Prediction
from hvdlm_planner.device_memory import device_memory
from hvdlm_planner.habits import habits_of
from hvdlm_planner.planned_run import plan_run

_MEMORY = ("parameters", "gradients", "optimizer", "activations")


def describe(config: Config, hardware: Hardware | None = None, gpu_memory: float | None = None) -> str:
    """Return the plan of ``config``, whose number of ranks is the product of the parallel options.

    Args:
        hardware: the machine by which seconds are predicted; None: they are not.
        gpu_memory: bytes of a GPU; None: those of ``hardware``, or else of this machine's GPUs.

    Raises:
        HvdlmError: the first problem.
    """
    run = plan_run(config, hardware)
    config, manager, mesh, spec = run.config, run.manager, run.mesh, run.spec
    # Data and context ranks have equal costs, and tensor ranks nearly so: the one with most stands for its stage.
    stages = []
    for stage in range(mesh.pipeline):
        predictions = []
        for rank in map(partial(mesh.rank_of, stage), range(mesh.tensor)):
            prediction = predict_costs(manager, config, spec, mesh, rank)
            if prediction is None:
                raise HvdlmError(f"model.name {config.model.name}: no plugin predicts the costs of a {spec.kind}.")
            predictions.append(prediction)
        stages.append(max(predictions, key=lambda prediction: sum(prediction.memory.values())))
    lines = [*_header(config, spec, mesh, stages[0], run.vocab), "", *_memory(stages)]
    size = max(stage.memory["parameters"] for stage in stages) - spec.frozen_bytes
    if (kept := kept_bytes(config, mesh, size)) and mesh.replicas > 1:
        exchange, algorithm = config.communication.exchange, config.communication.compression.algorithm
        by = f"compression {algorithm}" if exchange == "all_reduce" else exchange
        lines.append(f"  beside these, {by} keeps {_size(kept)} on a rank")
    if gpu_memory is None and hardware is None:
        gpu_memory = device_memory()
    lines += _fits(stages, [fit(stage, config, spec, mesh, hardware, gpu_memory) for stage in stages])
    sent = [_round_bytes(config, spec, mesh, mesh.rank_of(stage)) for stage in range(mesh.pipeline)]
    lines += ["", *_bytes(stages, mesh, sent, config.communication.local.steps)]
    if hardware is not None:
        time = predict_time(config, spec, mesh, hardware, run.moments, habits_of(config))
        lines += ["", *(_time(time, config, spec, mesh, hardware) if time else _no_time(config, spec))]
    return "\n".join(lines)


def _header(config: Config, spec: ModelSpec, mesh: Mesh, first: Prediction, vocab: int) -> Iterable[str]:
    train, parallel = config.train, config.parallel
    rows = train.micro_batch_size or train.batch_size // mesh.data
    tokens = train.batch_size * config.data.context
    set_by = "" if config.model.vocab or config.data.vocab_size else " (data.vocab_size is not set: a stand-in)"
    frozen = f" beside {spec.frozen_parameters:,} frozen ones" if spec.frozen else ""
    yield f"model     {config.model.name}: {spec.parameters:,} parameters{frozen}, vocabulary {vocab:,}{set_by}"
    shape = " x ".join(str(n) for n in mesh.shape)
    switches = [f"zero {parallel.zero}", f"sequence {str(parallel.sequence).lower()}", f"schedule {parallel.schedule}"]
    if parallel.virtual_stages > 1:
        switches.append(f"virtual stages {parallel.virtual_stages}")
    yield f"ranks     {mesh.size}: {shape} ({' x '.join(mesh.axes)}); {', '.join(switches)}"
    recomputed = "recomputed" if train.activation_checkpointing else "kept"
    precision = (
        "fp32 (auto; on a GPU with bf16, activations take less)" if train.precision == "auto" else train.precision
    )
    yield f"precision {precision}, weights and gradients fp32; activations {recomputed}"
    yield (
        f"step      {train.batch_size:,} sequences, {tokens:,} tokens; {first.micro_batches} micro-batch(es) of {rows} "
        f"sequence(s) on a rank; idle share {100 * first.idle_share:.1f}%"
    )
    flops = spec.flops_per_token * tokens
    yield f"compute   {spec.flops_per_token:.3g} FLOPs per token, {flops / mesh.size:.3g} per step and rank"


def _memory(stages: list[Prediction]) -> Iterable[str]:
    yield "memory of a rank".ljust(24) + "".join(name.rjust(14) for name in (*_MEMORY, "total"))
    for number, stage in enumerate(stages):
        figures = [stage.memory[name] for name in _MEMORY]
        yield _label(number, stage) + "".join(_size(count).rjust(14) for count in (*figures, sum(figures)))


def _fits(stages: list[Prediction], fits: list[Fit | None]) -> Iterable[str]:
    """Yield whether every stage fits, and what is not counted."""
    known = [(stage, one) for stage, one in zip(stages, fits, strict=True) if one is not None]
    if not known:
        return
    yield ""
    yield f"fit into {known[0][1].available / 1e9:,.1f} GB a GPU".ljust(24) + "needed".rjust(14) + "left".rjust(14)
    for number, (stage, one) in enumerate(known):
        left = _size(one.headroom) if one.fits else f"-{_size(-one.headroom)}"
        verdict = "fits" if one.fits else "DOES NOT FIT"
        yield _label(number, stage) + _size(one.needed).rjust(14) + left.rjust(14) + f"  {verdict}"
    reserved = ", ".join(f"{name} {_size(size)}" for name, size in known[0][1].reserved.items())
    counted = f"  counted beside the model: {reserved}; " if reserved else "  "
    yield f"{counted}not counted: {', '.join(known[0][1].not_counted)}"


def _time(time: StepTime, config: Config, spec: ModelSpec, mesh: Mesh, hardware: Hardware) -> Iterable[str]:
    """Yield the seconds of a step by cause, and by what they were predicted."""
    causes = ("compute", "communication", "bubble", "data", "save")
    yield "seconds of a step".ljust(24) + "".join(name.rjust(14) for name in (*causes, "total"))
    seconds = [getattr(time, name) for name in causes]
    yield "the slowest rank".ljust(24) + "".join(f"{value:.4g}".rjust(14) for value in (*seconds, time.seconds))
    rate = config.train.batch_size * config.data.context / time.seconds
    peak = hardware.rates_of(config.framework, config.train.precision).product_flops_per_second
    mfu = spec.flops_per_token * rate / mesh.size / peak
    yield f"  {time.hidden:.4g} s of communication are hidden behind computation"
    yield f"  {rate:,.0f} tokens/s, {rate / mesh.size:,.0f} on a rank; model FLOPs utilization {100 * mfu:.1f}%"
    yield f"  by the figures of {hardware.name}"
    yield f"  fitted on: {hardware.fitted_on}"
    yield f"  tested on: {hardware.tested_on}"


def _no_time(config: Config, spec: ModelSpec) -> Iterable[str]:
    yield f"the seconds of a step are not predicted: {unknown(config, spec)}"


def _round_bytes(config: Config, spec: ModelSpec, mesh: Mesh, rank: int) -> float:
    """Return the bytes that ``rank`` hands over in a round of local SGD or DiLoCo; 0: there are none."""
    work = work_of(config, spec, mesh, rank)
    rounds = work.rounds if work else ()
    each = sum(c.bytes * c.count / (mesh.data if c.operation == "all_gather" else 1) for c in rounds)
    return each * config.communication.local.steps


def _bytes(stages: list[Prediction], mesh: Mesh, sent: list[float], steps: int) -> Iterable[str]:
    axes = (*mesh.axes, "model", *(["node"] if any("node" in (stage.bytes or {}) for stage in stages) else []))
    yield "bytes of a rank's step".ljust(24) + "".join(name.rjust(14) for name in (*axes, "total"))
    for number, stage in enumerate(stages):
        if stage.bytes is None and sent[number]:
            differences = f"{_size(sent[number])} of parameter differences in a round of {steps} steps"
            yield _label(number, stage) + f"  {differences}, {_size(sent[number] / steps)} in the mean step"
            continue
        if stage.bytes is None:
            yield _label(number, stage) + "  gradients are not summed whole at every step: see docs/compression.md"
            continue
        figures = [stage.bytes.get(axis, 0) for axis in axes]
        yield _label(number, stage) + "".join(_size(count).rjust(14) for count in (*figures, sum(figures)))


def _label(number: int, stage: Prediction) -> str:
    first, last, *of_other_chunks = stage.layers
    if of_other_chunks:  # too many ranges for a column
        return f"stage {number} ({sum(stage.layers[1::2]) - sum(stage.layers[::2])} layers)".ljust(24)
    return f"stage {number} (layers {first}-{last - 1})".ljust(24)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
