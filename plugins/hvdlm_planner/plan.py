"""The predicted memory and communication of every rank, as text: ``python -m hvdlm plan [OPTIONS of train]``."""

from __future__ import annotations

from collections.abc import Iterable

from hvdlm import plugins
from hvdlm.checkpoints.base_weights import resolve
from hvdlm.config import Config
from hvdlm.configuration import validation
from hvdlm.errors import HvdlmError
from hvdlm.models.lora import adapt
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.mesh import AXES, Mesh, make_mesh
from hvdlm.planning.closed_forms import predict_costs
from hvdlm.protocols.types import Prediction
from hvdlm.training.run import load_plugins

_MEMORY = ("parameters", "gradients", "optimizer", "activations")
_VOCAB = {"word": 10_000, "bpe": 4096}  # defaults of data.vocab_size


def describe(config: Config) -> str:
    """Return the plan of ``config``, whose number of ranks is the product of the parallel options.

    Raises:
        HvdlmError: the first problem.
    """
    config = resolve(config)
    validation.values(config)
    manager = load_plugins(config)
    manager.hook.hvdlm_prepare(config=config)
    p = config.parallel
    mesh = make_mesh((p.data or 1) * p.pipeline * p.tensor, p)
    validation.layout(config, mesh)
    validation.model(config, manager)
    vocab = config.model.vocab or config.data.vocab_size or _VOCAB.get(config.data.tokenizer, 256)
    maker = plugins.find_model(manager, config.model.name)
    spec = adapt(maker(config.model, vocab, config.data.context), config.lora)
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
    return "\n".join([*_header(config, spec, mesh, stages[0], vocab), "", *_memory(stages), "", *_bytes(stages)])


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
