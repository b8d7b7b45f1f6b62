"""``--dry_run``: what a run would need of every rank, by closed forms, without ranks, data or a framework."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from hvdlm_huggingface import folder as pretrained

from hvdlm import plugins
from hvdlm.config import Config
from hvdlm.configuration import validation
from hvdlm.errors import HvdlmError
from hvdlm.models.lora import adapt
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.mesh import AXES, Mesh, make_mesh
from hvdlm.protocols.types import Prediction

_MEMORY = ("parameters", "gradients", "optimizer", "activations")
_VOCAB = {"word": 10_000, "bpe": 4096}  # what data.vocab_size means where it is not set


def main(config: Config) -> int:
    """Print the plan of ``config``; its ranks are the product of the parallel options.

    Raises:
        HvdlmError: the first thing found wrong.
    """
    config = copy.deepcopy(pretrained.resolve(config))
    validation.values(config)
    plugins.require(config.plugins)
    names = [config.framework, config.task, config.communication.exchange, "sharding", *config.plugins]
    if config.communication.compression.algorithm != "none":
        names += ["compression", config.communication.compression.algorithm]
    manager = plugins.load(names)
    manager.hook.hvdlm_prepare(config=config)
    p = config.parallel
    mesh = make_mesh((p.data or 1) * p.pipeline * p.tensor, p)
    validation.layout(config, mesh)
    known = plugins.models(manager)
    validation.model(config, known)
    vocab = config.model.vocab or config.data.vocab_size or _VOCAB.get(config.data.tokenizer, 256)
    spec = adapt(known[config.model.name](config.model, vocab, config.data.context), config.lora)
    manager.hook.hvdlm_check(config=config, spec=spec)
    # Data ranks need the same, and tensor ranks all but: of those, the one that needs most stands for its stage.
    stages = []
    for stage in range(mesh.pipeline):
        ranks = range(stage * mesh.tensor, (stage + 1) * mesh.tensor)
        found = [manager.hook.hvdlm_predict(config=config, spec=spec, mesh=mesh, rank=rank) for rank in ranks]
        if None in found:
            raise HvdlmError(f"model.name {config.model.name}: no plugin predicts what a {spec.kind} needs.")
        stages.append(max(found, key=lambda prediction: sum(prediction.memory.values())))
    print("\n".join([*_header(config, spec, mesh, stages[0], vocab), "", *_memory(stages), "", *_bytes(stages)]))
    return 0


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
    yield f"precision {train.precision}, weights and gradients fp32; activations {recomputed}"
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
            yield _label(number, stage) + "  not every step sums whole gradients: see docs/compression.md"
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
