"""The frozen base weights of LoRA adapters, which checkpoints identify by a hash and don't store.

They come from a Hugging Face folder, or are initial values that follow from the seed, and have to be the same whenever
a run is resumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hvdlm import plugins
from hvdlm.checkpoints.load import Checkpoint
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.models.spec import ModelSpec, ParamSpec
from hvdlm.protocols.pretrained import PretrainedFolder, UnavailableModel

Base = Mapping[str, Any]
"""An entry of a checkpoint's manifest: ``weights``, a hash, and ``factor``, by which adapters are multiplied."""


def resolve(config: Config) -> Config:
    """Return ``config`` with the sizes and the tokenizer of ``model.pretrained``; without it, ``config`` itself.

    Raises:
        HvdlmError: no plugin reads the folder, the model can't be had, or ``config`` asks for other sizes than its.
    """
    path = config.model.pretrained
    if path is None:
        return config
    # The config.yaml of a run has all that was in the folder: it is resumed without it, unless it needs the weights.
    complete = config.lora.rank is None and config.model.vocab is not None
    try:
        folder = _find_folder(path, config.plugins)
    except UnavailableModel:
        if not complete:
            raise
        return config
    if folder is not None:
        return folder.resolve(config)
    if complete:
        return config
    raise _unreadable(path) if config.lora.rank is None else _missing_base(path)


def open_pretrained(path: str, named: Iterable[str] = ()) -> PretrainedFolder:
    """Return the opened folder ``path`` of ``model.pretrained``; ``named``: the run's ``plugins``.

    Raises:
        HvdlmError: no plugin reads it.
    """
    folder = _find_folder(path, named)
    if folder is None:
        raise _unreadable(path)
    return folder


def _find_folder(path: str, named: Iterable[str]) -> PretrainedFolder | None:
    """Return the folder as the first plugin opens it that reads it; ``huggingface`` is asked last."""
    return plugins.load(["huggingface", *named]).hook.hvdlm_open_pretrained(path=Path(path))


def _unreadable(path: str) -> HvdlmError:
    return HvdlmError(
        f"model.pretrained {path}: no plugin finds a model there: name a Hugging Face folder of a language model, "
        "with its config.json."
    )


def _missing_base(path: str) -> HvdlmError:
    return HvdlmError(
        f"{path}, whose weights adapters are added to, is gone or no folder of a model: put it back, or say "
        "where it lies now (--model.pretrained FOLDER, and its --data.tokenizer; of convert, --base FOLDER)."
    )


def attach(
    spec: ModelSpec, pretrained: str | None, seed: int, named: Iterable[str] = ()
) -> tuple[ModelSpec, Base | None]:
    """Return ``spec`` with sources for its frozen weights, and the manifest's entry that identifies them.

    Without adapters: ``spec`` itself and None. A folder is read once, for its hash. ``named``: the run's ``plugins``.

    Raises:
        HvdlmError: the folder is missing or damaged.
    """
    if not spec.adapters:
        return spec, None
    if not isinstance(pretrained, str):
        initial = repr([seed, *((param.name, param.shape, param.init) for param in spec.frozen)])
        weights = hashlib.sha256(initial.encode()).hexdigest()
        spec = replace(spec, frozen=tuple(_initialised(param, seed) for param in spec.frozen))
    else:
        folder = _find_folder(pretrained, named)
        if folder is None:
            raise _missing_base(pretrained)
        spec, weights = folder.attach(spec), folder.fingerprint()
    return spec, {"weights": weights, "factor": spec.adapters[0].factor}


def _initialised(param: ParamSpec, seed: int) -> ParamSpec:
    return replace(param, source=lambda _, box: param.initial_box(seed, box))


def check(checkpoint: Checkpoint, base: Base | None) -> None:
    """Check that a checkpoint's adapters belong to the base weights of this run.

    Raises:
        HvdlmError: they were trained on other weights, or only one of the two has adapters.
    """
    before: Any = checkpoint.manifest.get("base")
    if before is None and base is None:
        return
    if before is None:
        raise HvdlmError(
            f"checkpoint {checkpoint.path} holds whole weights and no adapters: leave --lora.rank out, or write it as "
            "a folder (convert --format huggingface) and start from that (--model.pretrained)."
        )
    if base is None:
        raise HvdlmError(
            f"checkpoint {checkpoint.path} holds adapters: use the lora options of its run (RUN/config.yaml)."
        )
    if before.get("weights") != base["weights"]:
        raise HvdlmError(
            f"checkpoint {checkpoint.path} has adapters of other base weights: --model.pretrained has to be the folder "
            "that its run started from, unchanged; without one, train.seed and the model's sizes have to be the same."
        )
    if before.get("factor") != base["factor"]:
        raise HvdlmError(
            f"checkpoint {checkpoint.path} has adapters that are multiplied by {before.get('factor')}, and lora.alpha "
            f"/ lora.rank is {base['factor']} here: use those of its run (RUN/config.yaml)."
        )
