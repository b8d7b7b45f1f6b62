"""Which model a checkpoint holds, as its manifest says: for whoever opens it without the run that wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvdlm.checkpoints.base_weights import attach, check
from hvdlm.checkpoints.load import Checkpoint
from hvdlm.config import LoRAConfig, ModelConfig
from hvdlm.errors import HvdlmError
from hvdlm.models.lora import adapt
from hvdlm.models.spec import ModelMaker, ModelSpec


def spec_of(checkpoint: Checkpoint, makers: Mapping[str, ModelMaker], folder: str | None = None) -> ModelSpec:
    """Return the model that a checkpoint's manifest describes, its parameters those that are stored.

    Args:
        checkpoint: an open one.
        makers: the models that it may be, by name.
        folder: where the weights lie that its adapters are added to; None: where the manifest says.

    Raises:
        HvdlmError: it is none of them, or doesn't say; or what it has adapters to is gone, or is something else.
    """
    config: Any = checkpoint.manifest.get("config") or {}
    try:
        model = ModelConfig(**config["model"])
        vocab, context = checkpoint.manifest["vocab"], config["data"]["context"]
        spec = adapt(makers[model.name](model, int(vocab), int(context)), LoRAConfig(**config.get("lora") or {}))
        seed, folder = int((config.get("train") or {}).get("seed", 0)), folder or model.pretrained
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise HvdlmError(f"checkpoint {checkpoint.path} doesn't say which known model it is: {error}.") from error
    for param in spec.params:
        stored = checkpoint.tensors.get(f"parameters/{param.name}")
        if stored is None or stored[0].shard.shape != param.shape:
            raise HvdlmError(
                f"checkpoint {checkpoint.path}: {param.name} is missing or has another shape than it says."
            )
    spec, base = attach(spec, folder, seed)
    check(checkpoint, base)
    return spec
