"""Rebuilds a model's description from a checkpoint's manifest, without the run that wrote it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hvdlm import plugins
from hvdlm.checkpoints.base_weights import attach, check
from hvdlm.checkpoints.load import Checkpoint, unknown_parameter
from hvdlm.config import DataConfig, LoRAConfig, ModelConfig, TrainConfig
from hvdlm.configuration.ranges import check as check_ranges
from hvdlm.configuration.schema import instance
from hvdlm.errors import HvdlmError
from hvdlm.io import untrusted_input
from hvdlm.io.value_checks import count, fields
from hvdlm.models.lora import adapt
from hvdlm.models.spec import ModelSpec

_PREFIX = "parameters/"
_LAYERS = 1000  # described in a moment; more are believed only of a checkpoint with as many parameters
_TYPES = fields({"vocab": count(1, 2**31), "context": count(), "seed": count(high=2**63)})


def spec_of(checkpoint: Checkpoint, folder: str | None = None, plugin_names: Iterable[str] = ()) -> ModelSpec:
    """Return the description of a checkpoint's model, checked against the parameters that are stored.

    Args:
        checkpoint: an open checkpoint.
        folder: the folder of the base weights of its adapters; None: the one that the manifest names.
        plugin_names: plugins whose models are known, besides those of the core and of the plugin named like the model.

    Raises:
        HvdlmError: its model is missing or unknown, or the base weights of its adapters are missing or others.
    """
    config: Any = checkpoint.manifest.get("config") or {}
    try:
        model = instance(ModelConfig, config["model"], "model")
        lora = instance(LoRAConfig, config.get("lora") or {}, "lora")
        data = DataConfig(context=config["data"]["context"])
        train = TrainConfig(seed=(config.get("train") or {}).get("seed", 0))
        _TYPES({"vocab": checkpoint.manifest["vocab"], "context": data.context, "seed": train.seed}, "")
        check_ranges({"model": model, "lora": lora, "data": data, "train": train})
        if model.layers > max(_LAYERS, len(checkpoint.tensors)):
            raise ValueError(f"{model.layers} layers have more parameters than it holds")
        maker = plugins.provided(plugins.load([model.name, *plugin_names]), "models")[model.name]
        spec = adapt(maker(model, checkpoint.manifest["vocab"], data.context), lora)
        named = list(map(str, config.get("plugins") or []))
    except (KeyError, TypeError, ValueError, AttributeError, HvdlmError) as error:
        reason = untrusted_input.shown(str(error).rstrip("."), 300)
        raise HvdlmError(f"checkpoint {checkpoint.path} doesn't describe a known model: {reason}.") from error
    require_parameters(checkpoint, spec)
    spec, base = attach(spec, folder or model.pretrained, train.seed, named)
    check(checkpoint, base)
    return spec


def require_parameters(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    """Check that a checkpoint holds the parameters of ``spec``, in their shapes, and no others.

    Raises:
        HvdlmError: one is missing, has another shape, or belongs to no layer of the model.
    """
    shapes = {f"{_PREFIX}{param.name}": param.shape for param in spec.params}
    for name, shape in shapes.items():
        stored = checkpoint.tensors.get(name)
        if stored is None or stored[0].shard.shape != shape:
            raise HvdlmError(
                f"checkpoint {checkpoint.path}: {name.removeprefix(_PREFIX)} is missing or has another shape than its "
                "manifest's settings give it. Use another checkpoint."
            )
    if other := unknown_parameter(checkpoint, spec):
        raise HvdlmError(
            f"checkpoint {checkpoint.path} holds {other}, which its model {spec.kind} lacks: its manifest doesn't "
            "describe what it holds. Use another checkpoint."
        )
