"""Atomic, framework-free checkpoints: safetensors files under global names and a manifest, in a folder of their own.

``RUN/checkpoints/step-00000500/`` holds ``model.safetensors`` (parameters), ``optimizer.safetensors`` (its state),
``carry.safetensors`` (recurrent state), ``rank-0000.safetensors`` ... (what each rank alone knows: error feedback) and
``manifest.json``. Where ranks hold different pieces of a model, each writes its own: ``model-0000.safetensors`` ...,
and the manifest says which piece of which tensor lies where. All is written into a folder with a temporary name, synced
to disk and renamed; a checkpoint is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hvdlm.interfaces import HvdlmError, RankError, World
from hvdlm.models.layout import Piece, whole
from hvdlm.pieces import Reader, Stored, from_json, key, kind, to_json

FORMAT = "hvdlm-checkpoint-2"
_STEP = re.compile(r"step-(\d{8,})$")
_LIMIT = 64 * 2**20  # a manifest larger than this is none of ours


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk: its folder, its manifest and, by global name, where pieces of its tensors lie."""

    path: Path
    manifest: dict[str, Any]
    tensors: dict[str, list[Stored]]

    @property
    def step(self) -> int:
        """Optimizer steps done when it was written."""
        return int(self.manifest["step"])

    def reader(self) -> Reader:
        """Return what reads pieces of its tensors."""
        return Reader(self.path, self.manifest["files"], self.tensors)


def save(
    folder: Path,
    step: int,
    state: Mapping[str, np.ndarray],
    meta: Mapping[str, Any],
    world: World,
    pieces: Mapping[str, Piece] | None = None,
) -> Path:
    """Write ``state`` (see ``Trainable.state``) as the checkpoint of ``step`` in ``folder``. All ranks call.

    ``pieces``: which piece of its global array an entry is; all of it where nothing is said. A piece that several
    ranks hold is written by the lowest of them.

    Raises:
        RankError: a rank could not write; what was there before is untouched.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f".step-{step:08d}.partial"
    shared = {name: array for name, array in state.items() if not name.startswith("exchange/")}
    held = {name: to_json(array, (pieces or {}).get(name) or whole(array.shape)) for name, array in shared.items()}
    if world.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        error = _attempt(lambda: temporary.mkdir(parents=True))
    else:
        error = None
    # Nobody writes before all have answered: by then the folder is there.
    answers = world.gather_objects({"error": error, "held": held})
    _raise_first([answer["error"] for answer in answers], "make", temporary)
    parts, tensors = _deal([answer["held"] for answer in answers])
    contents = {f: {key(n): shared[n] for n in names} for f, names in parts[world.rank].items()}
    contents[f"rank-{world.rank:04d}.safetensors"] = {k: v for k, v in state.items() if k.startswith("exchange/")}
    files: dict[str, Any] = {}
    error = _attempt(lambda: files.update({f: _write_tensors(temporary / f, c) for f, c in contents.items() if c}))
    answers = world.gather_objects({"error": error, "files": files})
    _raise_first([answer["error"] for answer in answers], "write", temporary)
    if world.rank == 0:
        files = {name: entry for answer in answers for name, entry in answer["files"].items()}
        manifest = {"format": FORMAT, "step": step, "world_size": world.size, **meta, "files": files}
        manifest["tensors"] = tensors
        error = _attempt(lambda: _publish(temporary, final, manifest))
    _raise_first(world.gather_objects(error), "publish", final)
    return final


def _deal(held: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, list[str]]], dict[str, list[Any]]]:
    """Return what every rank writes, {file: names}, and the manifest's tensors, from what every rank holds."""
    written: list[tuple[int, str, Any]] = []
    taken = set()
    for rank, entries in enumerate(held):
        for name, entry in entries.items():
            what = (name, json.dumps([entry["start"], entry["extent"], entry["flat"]]))
            if what not in taken:
                taken.add(what)
                written.append((rank, name, entry))
    writers = {(kind(name), rank) for rank, name, _ in written}
    alone = {first for first, count in Counter(first for first, _ in writers).items() if count == 1}
    parts: list[dict[str, list[str]]] = [{} for _ in held]
    tensors: dict[str, list[Any]] = {}
    for rank, name, entry in written:
        file = f"{kind(name)}.safetensors" if kind(name) in alone else f"{kind(name)}-{rank:04d}.safetensors"
        parts[rank].setdefault(file, []).append(name)
        tensors.setdefault(name, []).append({"file": file, **entry})
    return parts, tensors


def _attempt(action: Any) -> str | None:
    try:
        action()
    except OSError as error:
        return f"{error.strerror or error} ({error.filename or 'the checkpoint'})"
    return None


def _raise_first(errors: list[str | None], verb: str, path: Path) -> None:
    for rank, error in enumerate(errors):
        if error:
            raise RankError(
                f"rank {rank} could not {verb} the checkpoint {path}: {error}. Earlier checkpoints are untouched; "
                "free space or repair the folder and go on with --checkpoint.resume auto."
            )


def _write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    from safetensors.numpy import save as to_bytes

    # Not ascontiguousarray, which gives a dimension to arrays that have none.
    data = to_bytes({name: np.asarray(array, order="C") for name, array in sorted(tensors.items())})
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
            if not isinstance(entry["sha256"], str):
                raise ValueError(f"it has no SHA-256 of {name}")
        for name in ("step", "world_size"):
            if type(manifest[name]) is not int or manifest[name] < 0:
                raise ValueError(f"its {name} is {manifest[name]!r}")
        tensors = from_json(manifest["tensors"], manifest["files"])
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise HvdlmError(f"checkpoint {path} is damaged or foreign: {error}. Resume from another one.") from error
    return Checkpoint(path, manifest, tensors)


def load(checkpoint: Checkpoint, wanted: Mapping[str, Piece], rank: int, size: int) -> dict[str, np.ndarray]:
    """Return the state that ``rank`` of ``size`` goes on from, each array of shape ``wanted[name].held``.

    Only the files and slices that overlap with what is wanted are read, the files' hashes verified. Beside it come the
    optimizer's loss scale and, on as many ranks as it was saved by, what this rank alone knows (``exchange/``). What
    the checkpoint lacks is left out, and so is recurrent state of another batch: both start afresh.

    Raises:
        HvdlmError: a parameter is missing, a shape is another, a slice is missing or a file's hash is wrong.
    """
    reader, tensors = checkpoint.reader(), checkpoint.tensors
    state = {}
    for name, piece in (_loss_scale(checkpoint) | dict(wanted)).items():
        if name not in tensors:
            if name.startswith("parameters/"):
                raise _unfit(f"{name} is missing", piece)
            continue
        shape = tensors[name][0].piece.shape
        if name.startswith("carry/"):
            found = reader.covered(name, piece) if shape == piece.shape else None
            if found is not None:
                state[name] = found
            continue
        if shape != piece.shape:
            raise _unfit(f"{name} has shape {list(shape)}", piece)
        state[name] = reader.piece(name, piece)
    if checkpoint.manifest["world_size"] == size:
        state.update(reader.all(f"rank-{rank:04d}.safetensors"))
    return state


def _loss_scale(checkpoint: Checkpoint) -> dict[str, Piece]:
    name = "optimizer/loss_scale"
    return {name: whole(checkpoint.tensors[name][0].piece.shape)} if name in checkpoint.tensors else {}


def _unfit(what: str, expected: Piece) -> HvdlmError:
    return HvdlmError(
        f"the checkpoint doesn't fit the model: {what}, expected {list(expected.shape)}. Use the model settings it was "
        "trained with (RUN/config.yaml)."
    )
