"""Framework-free checkpoints: opens one, and reads the state that a rank resumes from.

``RUN/checkpoints/step-00000500/`` holds ``model.safetensors`` (parameters), ``optimizer.safetensors`` (its state),
``carry.safetensors`` (recurrent state), ``rank-0000.safetensors`` ... (state of single ranks: error feedback) and
``manifest.json``. Where ranks hold different shards of a model, each writes its own files, ``model-0000.safetensors``
..., and the manifest says which shard of which tensor is in which file. ``save`` writes checkpoints, ``discovery``
finds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hvdlm.checkpoints.manifest import read_manifest
from hvdlm.checkpoints.shards import Reader, Stored
from hvdlm.errors import HvdlmError
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.flat_layout import Shard, whole
from hvdlm.parallel.moving_average import KIND as AVERAGE
from hvdlm.protocols.state_dict import FIRST_STEP


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk.

    Attributes:
        path: its folder.
        manifest: the content of its manifest.json.
        tensors: the stored shards of each tensor, by global name.
        verified: whether the hashes of its files have been verified.
    """

    path: Path
    manifest: dict[str, Any]
    tensors: dict[str, list[Stored]]
    verified: bool = False

    @property
    def step(self) -> int:
        """Optimizer steps done when it was written."""
        return int(self.manifest["step"])

    def reader(self) -> Reader:
        """Return a reader of its tensors."""
        return Reader(self.path, self.manifest["files"], self.tensors, self.verified)


def open_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint in ``path``; its manifest and its files' presence and sizes are checked, not their hashes.

    Raises:
        CheckpointError: it is missing, foreign or damaged.
    """
    return Checkpoint(path, *read_manifest(path))


def averaged(checkpoint: Checkpoint) -> Checkpoint:
    """Return ``checkpoint`` with the moving average of its parameters (``train.ema``) in their place.

    Raises:
        HvdlmError: it holds none.
    """
    tensors = dict(checkpoint.tensors)
    for name in [name for name in tensors if name.startswith("parameters/")]:
        alias = f"optimizer/{AVERAGE}/{name.removeprefix('parameters/')}"
        if alias not in checkpoint.tensors:
            raise HvdlmError(
                f"checkpoint {checkpoint.path} holds no moving average of the weights: leave --weights ema out, or "
                "train with --train.ema 0.999."
            )
        tensors[name] = [replace(stored, alias=alias) for stored in checkpoint.tensors[alias]]
    return replace(checkpoint, tensors=tensors)


def unknown_parameter(checkpoint: Checkpoint, spec: ModelSpec) -> str | None:
    """Return the name of a stored parameter that ``spec`` lacks; None: there is none."""
    known = {param.name for param in spec.params}
    stored = (name.removeprefix("parameters/") for name in sorted(checkpoint.tensors) if name.startswith("parameters/"))
    return next((name for name in stored if name not in known), None)


def read_state(checkpoint: Checkpoint, wanted: Mapping[str, Shard], rank: int, size: int) -> dict[str, np.ndarray]:
    """Return the state that ``rank`` of ``size`` resumes from, each array of shape ``wanted[name].held``.

    Only files and slices that overlap with ``wanted`` are read, and the files' hashes are verified. The result also has
    the optimizer's loss scale and first step and, on as many ranks as wrote the checkpoint, this rank's own state
    (``exchange/``). Names that the checkpoint lacks are left out, and so is recurrent state of another batch: both
    start from scratch.

    Raises:
        HvdlmError: a parameter is missing, a shape differs, a slice is missing or a file's hash is wrong.
    """
    reader, tensors = checkpoint.reader(), checkpoint.tensors
    state = {}
    for name, shard in (_scalars(checkpoint) | dict(wanted)).items():
        if name not in tensors:
            if name.startswith("parameters/"):
                raise _unfit(f"{name} is missing", shard)
            continue
        shape = tensors[name][0].shard.shape
        if name.startswith("carry/"):
            array = reader.read_if_covered(name, shard) if shape == shard.shape else None
            if array is not None:
                state[name] = array
            continue
        if shape != shard.shape:
            raise _unfit(f"{name} has shape {list(shape)}", shard)
        state[name] = reader.read(name, shard)
    if checkpoint.manifest["world_size"] == size:
        state.update(reader.read_rank_file(f"rank-{rank:04d}.safetensors"))
    return state


def _scalars(checkpoint: Checkpoint) -> dict[str, Shard]:
    names = [name for name in ("optimizer/loss_scale", FIRST_STEP) if name in checkpoint.tensors]
    return {name: whole(checkpoint.tensors[name][0].shard.shape) for name in names}


def _unfit(difference: str, expected: Shard) -> HvdlmError:
    return HvdlmError(
        f"the checkpoint doesn't fit the model: {difference}, expected {list(expected.shape)}. Use the model settings "
        "it was trained with (RUN/config.yaml)."
    )
