"""Publishes, replaces and deletes checkpoints in a run's folder, by renaming whole folders.

``step-00000500`` is a checkpoint, ``.step-00000500.partial`` one that is being written, ``.step-00000500.replaced`` one
that another of the same step replaces, ``.step-00000500.deleted`` one that is being deleted: a folder under a
checkpoint's name is whole at all times. ``latest`` names the one that was written last.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hvdlm.checkpoints.discovery import step_folders
from hvdlm.checkpoints.errors import CheckpointError
from hvdlm.checkpoints.manifest import MANIFEST, is_checkpoint, read_manifest
from hvdlm.checkpoints.order import (
    LATEST,
    LATEST_PARTIAL,
    PENDING,
    SET_ASIDE_PATTERN,
    STEP_PATTERN,
    named_latest,
    read_name,
    step_name,
)
from hvdlm.checkpoints.shared_folders import MARKER
from hvdlm.io.atomic_files import replace, sync_folder, write_synced
from hvdlm.io.safe_files import delete_file, delete_folder, delete_if_empty, entries, kind

_HIDDEN = re.compile(rf"\.({STEP_PATTERN})\.(partial|replaced|deleted)")
_PARTIAL_FILE = re.compile(rf"\.({LATEST}|{re.escape(PENDING)})(\.[0-9a-f]{{8}})?\.partial")


def partial(folder: Path, name: str) -> Path:
    """Return the folder in which the checkpoint ``name`` is written before it is whole."""
    return folder / f".{name}.partial"


def _replaced(folder: Path, name: str) -> Path:
    return folder / f".{name}.replaced"


def publish(folder: Path, name: str, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, the last of a checkpoint's files, and rename the checkpoint's folder to its final name.

    An earlier checkpoint of the same name is set aside until ``delete_old``.
    """
    temporary = partial(folder, name)
    final = folder / name
    old = _replaced(folder, name)
    latest = folder / LATEST_PARTIAL
    write_synced(temporary / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True).encode())
    write_synced(latest, name.encode())  # before any rename: from here on no more space is needed
    sync_folder(temporary)
    if final.exists():
        delete_folder(old)
        os.rename(final, old)
    os.rename(temporary, final)
    os.replace(latest, folder / LATEST)
    sync_folder(folder)


def withdraw(folder: Path, name: str, published: bool) -> None:
    """Undo a save in this folder that failed on some node; ``published``: in this folder it had succeeded."""
    with contextlib.suppress(OSError):  # the error that it failed with says more; the next start cleans up
        delete_folder(partial(folder, name))
        delete_file(folder / LATEST_PARTIAL)
    if published:
        _delete_checkpoint(folder / name)
    with contextlib.suppress(OSError):
        _restore(folder, name)
        newest = step_folders(folder)
        if published and newest:
            replace(folder / LATEST, newest[0][1].name)


def _restore(folder: Path, name: str) -> None:
    old, final = _replaced(folder, name), folder / name
    if old.is_dir() and not old.is_symlink() and not final.exists():
        os.rename(old, final)


def delete_old(folder: Path, step: int, keep: int, keep_best: int, complete: bool = True) -> None:
    """Delete the checkpoints that are no longer kept, now that the one of ``step`` is whole on all nodes.

    The newest ``keep`` up to ``step`` are kept, and the ``keep_best`` with the lowest ``val_loss``. Those of later
    steps are kept too: this run hasn't written them. So are those that were set aside. Damaged ones don't count and are
    deleted. ``complete``: a checkpoint counts only if all of its files are in this folder.
    """
    _delete(_replaced(folder, step_name(step)))
    paths = [path for number, path in step_folders(folder) if number <= step]
    losses: dict[Path, float] = {}
    for path in paths:
        if len(losses) < max(1, keep) or keep_best:  # a manifest takes time to read: no more than needed
            loss = _val_loss(path, complete)
            if loss is not None:
                losses[path] = loss
    kept = {*list(losses)[: max(1, keep)], *_best(losses, keep_best)}
    for path in paths if losses else ():
        if path not in kept:
            _delete_checkpoint(path)


def _delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint, renaming it first, so that no incomplete folder ever has a checkpoint's name."""
    hidden = path.with_name(f".{path.name}.deleted")
    try:
        if _is_ours(path):
            delete_folder(hidden)
            os.rename(path, hidden)
            delete_folder(hidden)
    except OSError as error:
        _report(path, error)


def _best(losses: Mapping[Path, float], count: int) -> list[Path]:
    """Return the ``count`` paths with the lowest finite losses, of equal ones the first."""
    finite = [path for path, loss in losses.items() if math.isfinite(loss)]
    return sorted(finite, key=lambda path: losses[path])[:count]


def _val_loss(path: Path, complete: bool) -> float | None:
    """Return a checkpoint's ``val_loss``, infinite where it has none; None where it is damaged."""
    try:
        manifest, _ = read_manifest(path, complete)
        loss = manifest.get("metrics", {}).get("val_loss")
        return math.inf if loss is None else float(loss)
    except (CheckpointError, OverflowError, OSError):
        return None


def clean_up(folder: Path, whole: Collection[str] = ()) -> None:
    """Clean up what a killed run left behind in ``folder``.

    A checkpoint that was set aside is restored where no other took its name. A partial one is deleted, unless its name
    is in ``whole``, the checkpoints that were published on another node: then all of its files had been written in this
    folder, too, and it is published.
    """
    if not folder.is_dir():
        return
    with contextlib.suppress(OSError):
        if read_name(folder / LATEST_PARTIAL) == named_latest(folder):
            os.replace(folder / LATEST_PARTIAL, folder / LATEST)
    for path in sorted(folder.iterdir()):
        hidden = _HIDDEN.fullmatch(path.name)
        if not hidden and not path.name.startswith(MARKER) and not _PARTIAL_FILE.fullmatch(path.name):
            continue
        with contextlib.suppress(OSError):
            if not _is_ours(path):
                continue
            if hidden and hidden[2] == "replaced":
                _restore(folder, hidden[1])
            elif hidden and hidden[1] in whole and not (folder / hidden[1]).exists():
                os.rename(path, folder / hidden[1])
            _delete(path)


def restore_replaced(folder: Path) -> None:
    """Restore every checkpoint that was set aside and whose name no other took."""
    for path in folder.glob(".step-*.replaced") if folder.is_dir() else ():
        with contextlib.suppress(OSError):
            _restore(folder, path.name[1:].removesuffix(".replaced"))


def delete_all(folder: Path) -> None:
    """Delete every checkpoint in ``folder`` with what belongs to it, and nothing else; a link is only removed.

    Raises:
        OSError: something can't be deleted.
    """
    if kind(folder) == "symbolic link":
        print(f"hvdlm: {folder} leads to {os.path.realpath(folder)}: the link is removed, its checkpoints stay there")
        delete_file(folder)
    elif folder.is_dir():
        for path in entries(folder):
            if re.fullmatch(SET_ASIDE_PATTERN, path.name) and kind(path) == "folder":
                delete_all(path)
            elif _is_ours(path):
                delete_folder(path)
        delete_if_empty(folder)


def _is_ours(path: Path) -> bool:
    """Return whether hvdlm wrote what is in a folder of checkpoints under this name: the name alone is not enough."""
    is_now = kind(path)
    if path.name in (LATEST, PENDING) or _PARTIAL_FILE.fullmatch(path.name) or path.name.startswith(MARKER):
        return is_now == "file"
    if not _HIDDEN.fullmatch(path.name) and not re.fullmatch(STEP_PATTERN, path.name):
        return False
    if is_now != "folder":
        return is_now == "symbolic link"
    return is_checkpoint(path)


def _delete(path: Path) -> None:
    """Delete what is no longer needed; where that fails, training continues, and a line says that space is lost."""
    try:
        delete_folder(path)
    except OSError as error:
        _report(path, error)


def _report(path: Path, error: OSError) -> None:
    print(f"hvdlm: {path} can't be deleted, its space stays taken: {error.strerror}", file=sys.stderr, flush=True)
