"""Rebuilds a model's description from a checkpoint's manifest, without the run that wrote it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hvdlm import plugins
from hvdlm.checkpoints.base_weights import attach, check
from hvdlm.checkpoints.load import Checkpoint
from hvdlm.config import LoRAConfig, ModelConfig
from hvdlm.errors import HvdlmError
from hvdlm.models.lora import adapt
from hvdlm.models.spec import ModelSpec


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
        model = ModelConfig(**config["model"])
        vocab, context = checkpoint.manifest["vocab"], config["data"]["context"]
        maker = plugins.models(plugins.load([model.name, *plugin_names]))[model.name]
        spec = adapt(maker(model, int(vocab), int(context)), LoRAConfig(**config.get("lora") or {}))
        seed = int((config.get("train") or {}).get("seed", 0))
        folder = folder or model.pretrained
        named = list(map(str, config.get("plugins") or []))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise HvdlmError(f"checkpoint {checkpoint.path} doesn't describe a known model: {error}.") from error
    for param in spec.params:
        stored = checkpoint.tensors.get(f"parameters/{param.name}")
        if stored is None or stored[0].shard.shape != param.shape:
            raise HvdlmError(
                f"checkpoint {checkpoint.path}: {param.name} is missing or has another shape than its manifest's "
                "settings give it."
            )
    spec, base = attach(spec, folder, seed, named)
    check(checkpoint, base)
    return spec
