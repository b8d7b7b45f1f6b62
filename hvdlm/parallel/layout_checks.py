"""Checks that a model supports the configured parallel layout."""

from __future__ import annotations

from typing import Any

from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel import muon, parameter_groups
from hvdlm.parallel.sharding_rules import tied_names


def check(config: Config, spec: ModelSpec) -> None:
    """Check the layout and the settings that depend on the architecture.

    Raises:
        HvdlmError: the first problem.
    """
    p, s = config.parallel, spec.settings
    missing = [name for name in ("vocab", "layers", "width") if not isinstance(getattr(s, name, None), int)]
    if missing:
        raise HvdlmError(f"model.name {config.model.name}: its ModelSpec.settings lack the integer {missing[0]}.")
    if spec.kind == "own":
        _check_custom_module(config, s)
    elif spec.kind not in ("gpt", "rnn") and config.train.activation_checkpointing:
        raise HvdlmError(f"train.activation_checkpointing is for gpt and recurrent models, not for a {spec.kind}.")
    if config.data.document_masks and spec.kind != "gpt":
        raise HvdlmError(
            f"data.document_masks: they mask the attention of a GPT, and model.name {config.model.name} is none: leave "
            "it false, or begin rows with documents (--data.rows documents)."
        )
    if spec.loss == "ctc" and (config.train.label_smoothing or config.train.z_loss):
        raise HvdlmError(
            f"train.label_smoothing and train.z_loss change a cross entropy, model.name {config.model.name} has the "
            "loss of CTC: leave both at 0."
        )
    if spec.kind not in ("gpt", "rnn") and (p.tensor > 1 or p.pipeline > 1):
        what = "a plugin's own module" if spec.kind == "own" else f"a {spec.kind}"
        raise HvdlmError(
            f"model.name {config.model.name}: {what} can't be cut into tensor or pipeline ranks: leave "
            "parallel.tensor and parallel.pipeline at 1."
        )
    if spec.adapters and (p.tensor > 1 or p.pipeline > 1):
        raise HvdlmError(
            "lora.rank: adapters are trained by data ranks, each with the whole model: leave parallel.tensor and "
            "parallel.pipeline at 1 (parallel.zero works)."
        )
    if p.context > 1:
        _check_context(config, spec)
    if p.tensor > 1:
        _check_tensor(config, s, spec.kind)
    if p.pipeline > s.layers:
        raise HvdlmError(
            f"parallel.pipeline {p.pipeline} is more than model.layers {s.layers}: a stage needs at least one layer."
        )
    if p.virtual_stages > 1:
        _check_virtual_stages(config, s.layers, spec.kind)
    if p.sequence and p.tensor == 1:
        raise HvdlmError("parallel.sequence shards positions over tensor ranks: set --parallel.tensor 2 or more.")
    _check_exchange(config, spec)
    parameter_groups.check(config.train, spec)
    muon.check(config.train, spec)


def _check_custom_module(config: Config, s: Any) -> None:
    if s.framework != config.framework:
        raise HvdlmError(f"model.name {config.model.name} is a module of {s.framework}: --framework {s.framework}.")
    if config.train.activation_checkpointing:
        raise HvdlmError(
            f"train.activation_checkpointing recomputes layers, and hvdlm sees none in {config.model.name}: leave "
            "it false, and recompute inside of the module."
        )


def _check_context(config: Config, spec: ModelSpec) -> None:
    p, c = config.parallel, config.communication
    ranks, window = f"parallel.context {p.context}", getattr(spec.settings, "local_window", 0)
    if spec.kind != "gpt" or config.task != "language_model":
        what = f"task {config.task}" if spec.kind == "gpt" else f"model.name {config.model.name}"
        raise HvdlmError(
            f"{ranks} divides the positions of a GPT that is a language model, and not those of {what}: leave "
            "parallel.context at 1."
        )
    if spec.adapters:
        raise HvdlmError(f"lora.rank: adapters are trained by data ranks alone, and {ranks} asks for others: set it 1.")
    if window:
        raise HvdlmError(
            f"{ranks} has no attention of a window, and model.window {window} is shorter than data.context "
            f"{config.data.context}: --model.window {config.data.context}, or leave parallel.context at 1."
        )
    if config.data.context % (2 * p.context):
        example = -(-config.data.context // (2 * p.context)) * 2 * p.context
        raise HvdlmError(
            f"data.context {config.data.context} can't be cut into two chunks for each rank of {ranks}: choose a "
            f"multiple of {2 * p.context}, for example {example}."
        )
    wanted: dict[str, tuple[Any, Any, str]] = {
        "communication.exchange": (c.exchange, "all_reduce", "context ranks have parts of the same gradient"),
        "communication.reduction": (c.reduction, "average", "context ranks have parts of the same mean"),
        "communication.auto": (c.auto, False, "it measures data ranks alone"),
        "parallel.data_per_node": (p.data_per_node, 1, "its levels are those of data ranks alone"),
        "train.compile": (config.train.compile is True, False, "blocks travel while others are computed"),
        "data.document_masks": (config.data.document_masks, False, "blocks of keys are seen by all queries or by none"),
    }
    for key, (value, needed, reason) in wanted.items():
        if value != needed:
            raise HvdlmError(
                f"{key} {str(value).lower()} doesn't go with {ranks}, since {reason}: set --{key} "
                f"{str(needed).lower()}, or leave parallel.context at 1."
            )


def _check_virtual_stages(config: Config, layers: int, kind: str) -> None:
    p = config.parallel
    needs = f"parallel.virtual_stages {p.virtual_stages}"
    if p.pipeline == 1:
        raise HvdlmError(
            f"{needs} interleaves the stages of a pipeline: set --parallel.pipeline 2 or more, or "
            "--parallel.virtual_stages 1."
        )
    if p.schedule != "1f1b":
        raise HvdlmError(f"{needs} is of the schedule 1f1b, not of {p.schedule}: leave parallel.schedule out.")
    if kind != "gpt":
        raise HvdlmError(f"{needs} is for Transformers, not for a model of kind {kind}: leave it out.")
    if p.pipeline * p.virtual_stages > layers:
        raise HvdlmError(
            f"{needs} x parallel.pipeline {p.pipeline} is more than model.layers {layers}: a virtual stage needs at "
            "least one layer."
        )
    if p.zero > 1:
        raise HvdlmError(
            f"{needs} would have parallel.zero {p.zero} scatter all gradients in the passes of every virtual stage: "
            "set --parallel.zero 1, or leave it out."
        )


def _check_tensor(config: Config, s: Any, kind: str) -> None:
    tensor = config.parallel.tensor
    if kind == "rnn":
        _divides("model.width", s.width, tensor)
        if config.parallel.sequence:
            raise HvdlmError(
                "parallel.sequence is for Transformers: a recurrent model computes one position after the other."
            )
        return
    _divides("model.heads", s.heads, tensor)
    _divides("model.mlp_width", s.mlp_width, tensor)
    if s.kv_heads % tensor and tensor % s.kv_heads:
        raise HvdlmError(
            f"model.kv_heads {s.kv_heads} and parallel.tensor {tensor}: one has to divide the other, so that every "
            "rank holds the key-value heads of its query heads."
        )
    if config.parallel.sequence:
        _divides("data.context", config.data.context, tensor)


def _divides(key: str, value: int, tensor: int) -> None:
    if value % tensor:
        raise HvdlmError(
            f"{key} {value} can't be split over parallel.tensor {tensor} ranks: choose a multiple of {tensor}, for "
            f"example {-(-value // tensor) * tensor}."
        )


def _check_gathered_layers(config: Config, spec: ModelSpec) -> None:
    """Check that the parameters of a run with ZeRO-3 can be gathered layer by layer."""
    c, p = config.communication, config.parallel
    kind = "a plugin's" if spec.kind == "own" else f"{'an' if spec.kind == 'rnn' else 'a'} {spec.kind}"
    reasons = {
        f"the layers of {kind} model are not known": spec.kind != "gpt",
        "adapters (lora.rank) leave little to shard": bool(spec.adapters),
        f"the stages of parallel.pipeline {p.pipeline} have several micro-batches under way": p.pipeline > 1,
        "compiled steps (train.compile) keep whole parameters": config.train.compile is True,
        "train.optimizer muon updates whole matrices": config.train.optimizer == "muon",
        f"sends no compressed gradients ({c.compression.algorithm})": c.compression.algorithm != "none",
        f"sends them in float32, not in {p.zero_gather} (parallel.zero_gather)": p.zero_gather not in (None, "fp32"),
    }
    for reason, holds in reasons.items():
        if holds:
            raise HvdlmError(f"parallel.zero 3 gathers parameters layer by layer, and {reason}: set --parallel.zero 2.")


def _check_exchange(config: Config, spec: ModelSpec) -> None:
    p, c = config.parallel, config.communication
    if p.zero and (c.exchange != "all_reduce" or c.reduction == "adasum"):
        other = c.exchange if c.exchange != "all_reduce" else "communication.reduction adasum"
        raise HvdlmError(f"parallel.zero {p.zero} scatters sums of gradients, and {other} has none: leave one out.")
    if p.zero == 3:
        _check_gathered_layers(config, spec)
    if c.reduction == "adasum" and tied_names(spec, p.pipeline):
        raise HvdlmError(
            "communication.reduction adasum combines whole gradients, and two stages each compute one term of the tied "
            "embedding's gradient: --model.tie_embeddings false, or --communication.reduction average."
        )
    replicas_diverge = c.exchange != "all_reduce" and c.compression.algorithm != "none"
    if replicas_diverge and tied_names(spec, p.pipeline):
        raise HvdlmError(
            f"{c.exchange} with compression would let the two stages' copies of the tied embedding drift apart: "
            "--model.tie_embeddings false, or --communication.compression.algorithm none."
        )
