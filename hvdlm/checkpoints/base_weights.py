"""What adapters are added to: the weights that a run starts from, which its checkpoints name and don't hold.

A Hugging Face folder, or initial values that follow from the seed. They have to be the same whenever a run goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hvdlm_huggingface.folder import Folder, require_base

from hvdlm.checkpoints.load import Checkpoint
from hvdlm.errors import HvdlmError
from hvdlm.models.spec import ModelSpec, ParamSpec

Base = Mapping[str, Any]
"""As it stands in a checkpoint's manifest: ``weights``, a hash, and ``factor``, what adapters are multiplied by."""


def attach(spec: ModelSpec, pretrained: str | None, seed: int) -> tuple[ModelSpec, Base | None]:
    """Return ``spec`` with its frozen weights read from where they lie, and what tells them from others.

    Without adapters: ``spec`` itself and None. A folder is read once, for its hash.

    Raises:
        HvdlmError: the folder is gone, or is damaged.
    """
    if not spec.adapters:
        return spec, None
    if not isinstance(pretrained, str):
        drawn = repr([seed, *((param.name, param.shape, param.init) for param in spec.frozen)])
        weights = hashlib.sha256(drawn.encode()).hexdigest()
        spec = replace(spec, frozen=tuple(_drawn(param, seed) for param in spec.frozen))
    else:
        require_base(pretrained)
        folder = Folder(Path(pretrained))
        spec, weights = folder.attach(spec), folder.fingerprint()
    return spec, {"weights": weights, "factor": spec.adapters[0].factor}


def _drawn(param: ParamSpec, seed: int) -> ParamSpec:
    return replace(param, source=lambda _, box: param.initial_box(seed, box))


def check(found: Checkpoint, base: Base | None) -> None:
    """Check that a checkpoint's adapters are added to what they were trained on.

    Raises:
        HvdlmError: they would be added to other weights; or either of the two has none.
    """
    before: Any = found.manifest.get("base")
    if before is None and base is None:
        return
    if before is None:
        raise HvdlmError(
            f"checkpoint {found.path} holds whole weights and no adapters: leave --lora.rank out, or write it as a "
            "folder (convert --format huggingface) and start from that (--model.pretrained)."
        )
    if base is None:
        raise HvdlmError(
            f"checkpoint {found.path} holds adapters: go on with the lora options of its run (RUN/config.yaml)."
        )
    if before.get("weights") != base["weights"]:
        raise HvdlmError(
            f"checkpoint {found.path} has adapters to other weights than these: --model.pretrained has to be the "
            "folder that its run started from, unchanged; without one, train.seed and the model's sizes have to be "
            "the same."
        )
    if before.get("factor") != base["factor"]:
        raise HvdlmError(
            f"checkpoint {found.path} has adapters that are multiplied by {before.get('factor')}, lora.alpha / "
            f"lora.rank is {base['factor']} here: use those of its run (RUN/config.yaml)."
        )
