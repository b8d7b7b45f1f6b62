"""Atomic, framework-free checkpoints: safetensors files under global names and a manifest, in a folder of their own.

``RUN/checkpoints/step-00000500/`` holds ``model.safetensors`` (parameters), ``optimizer.safetensors`` (its state),
``rank-0000.safetensors`` ... (what each rank alone knows: recurrent state, error feedback) and
``manifest.json``. All is written into a folder with a temporary name, synced to disk and
renamed; a checkpoint is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hvdlm.interfaces import HvdlmError, RankError, World

FORMAT = "hvdlm-checkpoint-1"
_STEP = re.compile(r"step-(\d{8,})$")
_LIMIT = 64 * 2**20  # a manifest larger than this is none of ours


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk: its folder and its manifest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done when it was written."""
        return int(self.manifest["step"])


def save(folder: Path, step: int, state: Mapping[str, np.ndarray], meta: Mapping[str, Any], world: World) -> Path:
    """Write ``state`` (see ``Trainable.state``) as the checkpoint of ``step`` in ``folder``. All ranks call.

    Raises:
        RankError: a rank could not write; what was there before is untouched.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f".step-{step:08d}.partial"
    if world.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        error = _attempt(lambda: temporary.mkdir(parents=True))
    else:
        error = None
    _agree(world, error, "make", temporary)
    entries: dict[str, Any] = {}
    error = _attempt(lambda: entries.update(_write_parts(temporary, state, world.rank)))
    gathered = world.gather_objects({"error": error, "files": entries})
    files = {name: entry for part in gathered for name, entry in part["files"].items()}
    _raise_first([part["error"] for part in gathered], "write", temporary)
    if world.rank == 0:
        manifest = {"format": FORMAT, "step": step, "world_size": world.size, **meta, "files": files}
        error = _attempt(lambda: _publish(temporary, final, manifest))
    _agree(world, error, "publish", final)
    return final


def _attempt(action: Any) -> str | None:
    try:
        action()
    except OSError as error:
        return f"{error.strerror or error} ({error.filename or 'the checkpoint'})"
    return None


def _agree(world: World, error: str | None, verb: str, path: Path) -> None:
    _raise_first(world.gather_objects(error), verb, path)


def _raise_first(errors: list[str | None], verb: str, path: Path) -> None:
    for rank, error in enumerate(errors):
        if error:
            raise RankError(
                f"rank {rank} could not {verb} the checkpoint {path}: {error}. Earlier checkpoints are untouched; "
                "free space or repair the folder and go on with --checkpoint.resume auto."
            )


def _write_parts(folder: Path, state: Mapping[str, np.ndarray], rank: int) -> dict[str, Any]:
    parts = {f"rank-{rank:04d}": {k: v for k, v in state.items() if k.startswith(("carry/", "exchange/"))}}
    if rank == 0:
        parts["model"] = {k.removeprefix("parameters/"): v for k, v in state.items() if k.startswith("parameters/")}
        parts["optimizer"] = {k: v for k, v in state.items() if k.startswith("optimizer/")}
    return {f"{n}.safetensors": _write_tensors(folder / f"{n}.safetensors", t) for n, t in parts.items() if t}


def _write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    from safetensors.numpy import save as to_bytes

    data = to_bytes({name: np.ascontiguousarray(array) for name, array in sorted(tensors.items())})
    _write_synced(path, data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(temporary: Path, final: Path, manifest: Mapping[str, Any]) -> None:
    _write_synced(temporary / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True).encode())
    _sync_folder(temporary)
    if final.exists():  # the same step again, after a resume: the old one makes way only now
        shutil.rmtree(final)
    os.rename(temporary, final)
    _write_synced(final.parent / ".latest.partial", final.name.encode())
    os.replace(final.parent / ".latest.partial", final.parent / "latest")
    _sync_folder(final.parent)


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints in ``folder``."""
    whole = sorted(path for path in folder.iterdir() if _STEP.match(path.name))
    for path in whole[: max(0, len(whole) - keep)]:
        shutil.rmtree(path, ignore_errors=True)


def find(run: Path, which: str) -> Checkpoint | None:
    """Return the checkpoint that ``checkpoint.resume`` names: none, auto (the newest in ``run``), or a path.

    Raises:
        HvdlmError: the path is no checkpoint, or a damaged one.
    """
    if which == "none":
        return None
    if which != "auto":
        path = Path(which)
        if (path / "checkpoints").is_dir():
            return _newest(path / "checkpoints") or _missing(path)
        return open_checkpoint(path)
    return _newest(run / "checkpoints")


def _missing(path: Path) -> Checkpoint:
    raise HvdlmError(f"{path} holds no checkpoint yet: train first, or name another run or checkpoint folder.")


def _newest(folder: Path) -> Checkpoint | None:
    if not folder.is_dir():
        return None
    for path in sorted(folder.iterdir(), reverse=True):
        if _STEP.match(path.name) and (path / "manifest.json").is_file():
            return open_checkpoint(path)
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint in ``path``, its manifest read and its files' presence and sizes checked.

    Raises:
        HvdlmError: it is missing, foreign or damaged.
    """
    manifest_path = path / "manifest.json"
    if not manifest_path.is_file():
        raise HvdlmError(
            f"{path} is no hvdlm checkpoint: it has no manifest.json. Name a folder like RUN/checkpoints/step-..."
        )
    try:
        if manifest_path.stat().st_size > _LIMIT:
            raise ValueError("it is too large")
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        if manifest.get("format") != FORMAT:
            raise ValueError(f"its format is {manifest.get('format')!r}, not {FORMAT!r}")
        for name, entry in manifest["files"].items():
            if not re.fullmatch(r"[a-z]+(-\d+)?\.safetensors", name):
                raise ValueError(f"it names a file {name!r}")
            if (path / name).stat().st_size != entry["bytes"]:
                raise ValueError(f"{name} has not the {entry['bytes']} bytes it was written with")
        int(manifest["step"])
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise HvdlmError(f"checkpoint {path} is damaged or foreign: {error}. Resume from another one.") from error
    return Checkpoint(path, manifest)


def load(checkpoint: Checkpoint, rank: int, size: int) -> dict[str, np.ndarray]:
    """Return the state that ``rank`` of ``size`` goes on from, hashes verified.

    Recurrent state lies in rows of the global batch: on another number of ranks the rows are dealt out anew. Error
    feedback belongs to its rank: on another number of ranks it starts afresh.

    Raises:
        HvdlmError: a file's hash is wrong.
    """
    state = {f"parameters/{k}": v for k, v in _read(checkpoint, "model.safetensors").items()}
    state.update(_read(checkpoint, "optimizer.safetensors"))
    if checkpoint.manifest["world_size"] == size:
        state.update(_read(checkpoint, f"rank-{rank:04d}.safetensors"))
        return state
    parts = [_read(checkpoint, f"rank-{r:04d}.safetensors") for r in range(checkpoint.manifest["world_size"])]
    for name in parts[0]:
        if name.startswith("carry/"):
            rows = np.concatenate([part[name] for part in parts])
            state[name] = np.array_split(rows, size)[rank]
    return state


def load_parameters(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Return {``parameters/NAME``: array}, all that evaluation and generation need."""
    return {f"parameters/{k}": v for k, v in _read(checkpoint, "model.safetensors").items()}


def _read(checkpoint: Checkpoint, name: str) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load as from_bytes

    entry = checkpoint.manifest["files"].get(name)
    if entry is None:
        return {}
    data = (checkpoint.path / name).read_bytes()
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise HvdlmError(
            f"checkpoint {checkpoint.path} is damaged: {name} has another SHA-256. Resume from another one."
        )
    try:
        return from_bytes(data)
    except SafetensorError as error:
        raise HvdlmError(f"checkpoint {checkpoint.path} is damaged: {name}: {error}.") from error
