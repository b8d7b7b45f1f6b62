"""The predicted memory, communication and seconds of every rank as text: ``python -m hvdlm plan [OPTIONS]``."""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from hvdlm import plugins
from hvdlm.checkpoints.base_weights import resolve
from hvdlm.config import Config
from hvdlm.configuration import validation
from hvdlm.errors import HvdlmError
from hvdlm.models.lora import adapt
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.mesh import AXES, Mesh, make_mesh
from hvdlm.planning.closed_forms import predict_costs
from hvdlm.planning.hardware import Hardware
from hvdlm.planning.memory_fit import Fit, fit
from hvdlm.planning.step_time import StepTime, predict_time, resolved
from hvdlm.protocols.state_dict import optimizer_state
from hvdlm.protocols.types import Prediction
from hvdlm.training.run import load_plugins
from hvdlm_planner.device_memory import device_memory
from hvdlm_planner.habits import habits_of

_MEMORY = ("parameters", "gradients", "optimizer", "activations")
_VOCAB = {"word": 10_000, "bpe": 4096}  # defaults of data.vocab_size


def describe(config: Config, hardware: Hardware | None = None, gpu_memory: float | None = None) -> str:
    """Return the plan of ``config``, whose number of ranks is the product of the parallel options.

    Args:
        hardware: the machine by which seconds are predicted; None: they are not.
        gpu_memory: bytes of a GPU; None: those of ``hardware``, or else of this machine's GPUs.

    Raises:
        HvdlmError: the first problem.
    """
    config = resolve(config)
    if hardware is not None:
        config = resolved(config, hardware)
    validation.values(config)
    manager = load_plugins(config)
    manager.hook.hvdlm_prepare(config=config)
    p = config.parallel
    mesh = make_mesh((p.data or 1) * p.pipeline * p.tensor, p)
    validation.layout(config, mesh)
    validation.model(config, manager)
    spec, vocab = model_of(config, manager)
    # Data ranks have equal costs, and tensor ranks nearly so: the one with the highest stands for its stage.
    stages = []
    for stage in range(mesh.pipeline):
        predictions = []
        for rank in range(stage * mesh.tensor, (stage + 1) * mesh.tensor):
            prediction = predict_costs(manager, config, spec, mesh, rank)
            if prediction is None:
                raise HvdlmError(f"model.name {config.model.name}: no plugin predicts the costs of a {spec.kind}.")
            predictions.append(prediction)
        stages.append(max(predictions, key=lambda prediction: sum(prediction.memory.values())))
    lines = [*_header(config, spec, mesh, stages[0], vocab), "", *_memory(stages)]
    if gpu_memory is None and hardware is None:
        gpu_memory = device_memory()
    lines += _fits(stages, [fit(stage, config, spec, mesh, hardware, gpu_memory) for stage in stages])
    lines += ["", *_bytes(stages)]
    if hardware is not None:
        moments = len(optimizer_state(config.train, plugins.find_optimizer(manager, config.train)))
        time = predict_time(config, spec, mesh, hardware, moments, habits_of(config))
        lines += ["", *(_time(time, config, spec, mesh, hardware) if time else _no_time(spec))]
    return "\n".join(lines)


def model_of(config: Config, manager: pluggy.PluginManager) -> tuple[ModelSpec, int]:
    """Return the description of the model, and the size of its vocabulary, without looking at the data."""
    vocab = config.model.vocab or config.data.vocab_size or _VOCAB.get(config.data.tokenizer, 256)
    maker = plugins.find_model(manager, config.model.name)
    return adapt(maker(config.model, vocab, config.data.context), config.lora), vocab


def _header(config: Config, spec: ModelSpec, mesh: Mesh, first: Prediction, vocab: int) -> Iterable[str]:
    train, parallel = config.train, config.parallel
    rows = train.micro_batch_size or train.batch_size // mesh.data
    tokens = train.batch_size * config.data.context
    set_by = "" if config.model.vocab or config.data.vocab_size else " (data.vocab_size is not set: a stand-in)"
    frozen = f" beside {spec.frozen_parameters:,} frozen ones" if spec.frozen else ""
    yield f"model     {config.model.name}: {spec.parameters:,} parameters{frozen}, vocabulary {vocab:,}{set_by}"
    shape = " x ".join(str(n) for n in mesh.shape)
    switches = [f"zero {parallel.zero}", f"sequence {str(parallel.sequence).lower()}", f"schedule {parallel.schedule}"]
    yield f"ranks     {mesh.size}: {shape} ({' x '.join(AXES)}); {', '.join(switches)}"
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


def _no_time(spec: ModelSpec) -> Iterable[str]:
    yield f"the seconds of a step are not predicted: the work of a {spec.kind} is not known"


def _bytes(stages: list[Prediction]) -> Iterable[str]:
    axes = (*AXES, "model")
    yield "bytes of a rank's step".ljust(24) + "".join(name.rjust(14) for name in (*axes, "total"))
    for number, stage in enumerate(stages):
        if stage.bytes is None:
            yield _label(number, stage) + "  gradients are not summed whole at every step: see docs/compression.md"
            continue
        figures = [stage.bytes.get(axis, 0) for axis in axes]
        yield _label(number, stage) + "".join(_size(count).rjust(14) for count in (*figures, sum(figures)))


def _label(number: int, stage: Prediction) -> str:
    first, last = stage.layers
    return f"stage {number} (layers {first}-{last - 1})".ljust(24)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
