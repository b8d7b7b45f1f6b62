"""Framework-free checkpoints: safetensors files under global names and a manifest, in a folder of their own.

``RUN/checkpoints/step-00000500/`` holds ``model.safetensors`` (parameters), ``optimizer.safetensors`` (its state),
``carry.safetensors`` (recurrent state), ``rank-0000.safetensors`` ... (what each rank alone knows: error feedback) and
``manifest.json``. Where ranks hold different pieces of a model, each writes its own: ``model-0000.safetensors`` ...,
and the manifest says which piece of which tensor lies where. ``saving`` writes them, ``finding`` takes the right one.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hvdlm.checkpoints import retention
from hvdlm.checkpoints.manifest import read_manifest
from hvdlm.checkpoints.save import Saver
from hvdlm.checkpoints.shards import Reader, Stored
from hvdlm.config import CheckpointConfig
from hvdlm.errors import HvdlmError
from hvdlm.parallel.flat_layout import Shard, whole
from hvdlm.protocols.world import World


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk.

    Attributes:
        path: its folder.
        manifest: what its manifest.json says.
        tensors: by global name, where pieces of its tensors lie.
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
        """Return what reads pieces of its tensors."""
        return Reader(self.path, self.manifest["files"], self.tensors, self.verified)


def save(
    folder: Path,
    step: int,
    state: Mapping[str, np.ndarray],
    meta: Mapping[str, Any],
    world: World,
    shards: Mapping[str, Shard] | None = None,
) -> Path:
    """Write one checkpoint into ``folder``, wait until it is whole and return its path; see ``Saver.start``."""
    options = CheckpointConfig(keep=sys.maxsize, asynchronous=False)
    return Saver(folder, world, options).start(step, state, meta, shards)[-1].path


def open_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint in ``path``, its manifest and its files' presence and sizes checked, not their hashes.

    Raises:
        HvdlmError: it is missing, foreign or damaged.
    """
    return Checkpoint(path, *read_manifest(path))


def place(run: Path, which: str) -> tuple[Path, str | None]:
    """Return the folder that holds what ``which`` means, and its name there, None: the newest.

    ``which``: auto (the newest in the folder of ``run``), the path of another run, or that of a checkpoint.
    """
    if which == "auto":
        return run / "checkpoints", None
    path = Path(which)
    return (path / "checkpoints", None) if (path / "checkpoints").is_dir() else (path.parent, path.name)


def find(run: Path, which: str, warn: bool = True) -> Checkpoint | None:
    """Return the checkpoint that ``checkpoint.resume`` names, as one process sees it; see ``finding.choose``.

    Raises:
        HvdlmError: the one that is named is none, or all are damaged.
    """
    if which == "none":
        return None
    folder, name = place(run, which)
    if name is not None:
        return open_checkpoint(Path(which))
    why: HvdlmError | None = None
    for _, path in retention.steps(folder):
        try:
            return open_checkpoint(path)
        except HvdlmError as error:
            why = why or error
            if warn:
                skip(path, reason(error))
    if why:
        raise none_whole(folder, reason(why))
    if which != "auto":
        raise none_yet(which)
    return None


def none_yet(run: str) -> HvdlmError:
    """Return what is to be said where a run that is named has no checkpoint."""
    return HvdlmError(f"{run} holds no checkpoint yet: train first, or name another run or checkpoint folder.")


def none_whole(folder: Path, why: str) -> HvdlmError:
    """Return what is to be said where every checkpoint is damaged; ``why``: what the newest suffers from."""
    return HvdlmError(
        f"{folder} holds damaged checkpoints only, the newest because {why}: copy a whole one there, or start afresh "
        "with --checkpoint.resume none --log.overwrite true."
    )


def skip(path: Path, why: str) -> None:
    """Tell that a damaged checkpoint is left out."""
    print(f"hvdlm: checkpoint {path} is damaged ({why}): it is skipped", file=sys.stderr, flush=True)


def reason(error: HvdlmError) -> str:
    """Return why ``read_manifest`` refuses a checkpoint, without which one and what to do."""
    text = str(error).split(" is damaged or foreign: ")[-1].split(" is no hvdlm checkpoint: ")[-1]
    return text.rsplit(". ", 1)[0]


def load(checkpoint: Checkpoint, wanted: Mapping[str, Shard], rank: int, size: int) -> dict[str, np.ndarray]:
    """Return the state that ``rank`` of ``size`` goes on from, each array of shape ``wanted[name].held``.

    Only the files and slices that overlap with what is wanted are read, the files' hashes verified. Beside it come the
    optimizer's loss scale and, on as many ranks as it was saved by, what this rank alone knows (``exchange/``). What
    the checkpoint lacks is left out, and so is recurrent state of another batch: both start afresh.

    Raises:
        HvdlmError: a parameter is missing, a shape is another, a slice is missing or a file's hash is wrong.
    """
    reader, tensors = checkpoint.reader(), checkpoint.tensors
    state = {}
    for name, shard in (_loss_scale(checkpoint) | dict(wanted)).items():
        if name not in tensors:
            if name.startswith("parameters/"):
                raise _unfit(f"{name} is missing", shard)
            continue
        shape = tensors[name][0].shard.shape
        if name.startswith("carry/"):
            found = reader.covered(name, shard) if shape == shard.shape else None
            if found is not None:
                state[name] = found
            continue
        if shape != shard.shape:
            raise _unfit(f"{name} has shape {list(shape)}", shard)
        state[name] = reader.shard(name, shard)
    if checkpoint.manifest["world_size"] == size:
        state.update(reader.all(f"rank-{rank:04d}.safetensors"))
    return state


def _loss_scale(checkpoint: Checkpoint) -> dict[str, Shard]:
    name = "optimizer/loss_scale"
    return {name: whole(checkpoint.tensors[name][0].shard.shape)} if name in checkpoint.tensors else {}


def _unfit(what: str, expected: Shard) -> HvdlmError:
    return HvdlmError(
        f"the checkpoint doesn't fit the model: {what}, expected {list(expected.shape)}. Use the model settings it was "
        "trained with (RUN/config.yaml)."
    )
