"""What lies in a run's checkpoint folder as time passes: how a checkpoint comes in, is replaced, and goes.

``step-00000500`` is a checkpoint, ``.step-00000500.partial`` one that is being written, ``.step-00000500.replaced`` one
that makes way for another of the same step, ``.step-00000500.deleted`` one that goes: what is called a checkpoint is
whole, also while it is being deleted. ``latest`` names the one that was written last.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hvdlm.checkpoints.manifest import read_manifest
from hvdlm.checkpoints.shared_folders import MARKER
from hvdlm.errors import HvdlmError
from hvdlm.io.atomic_files import sync_folder, write_synced

_STEP = re.compile(r"step-(\d{8,15})")
_HIDDEN = re.compile(r"\.(step-\d{8,15})\.(partial|replaced|deleted)")


def name_of(step: int) -> str:
    """Return what the checkpoint of ``step`` is called."""
    return f"step-{step:08d}"


def partial(folder: Path, name: str) -> Path:
    """Return where the checkpoint ``name`` is written before it is whole."""
    return folder / f".{name}.partial"


def _aside(folder: Path, name: str) -> Path:
    return folder / f".{name}.replaced"


def steps(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of everything that is called a checkpoint, the newest first; nothing where no folder is."""
    try:
        found = [(_STEP.fullmatch(path.name), path) for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def publish(folder: Path, name: str, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, the last of a checkpoint's files, and put the checkpoint in place.

    One of the same name is kept aside until ``tidy``.
    """
    temporary, final, old, latest = (
        partial(folder, name),
        folder / name,
        _aside(folder, name),
        folder / ".latest.partial",
    )
    write_synced(temporary / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True).encode())
    write_synced(latest, name.encode())  # before anything is moved: from here on no more space is needed
    sync_folder(temporary)
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
    os.rename(temporary, final)
    os.replace(latest, folder / "latest")
    sync_folder(folder)


def withdraw(folder: Path, name: str, published: bool) -> None:
    """Take back what a save that failed on another node, or here, left here; ``published``: here it had succeeded."""
    shutil.rmtree(partial(folder, name), ignore_errors=True)
    with contextlib.suppress(OSError):
        (folder / ".latest.partial").unlink(missing_ok=True)
    if published:
        _drop(folder / name)
    with contextlib.suppress(OSError):
        _put_back(folder, name)


def _put_back(folder: Path, name: str) -> None:
    old, final = _aside(folder, name), folder / name
    if old.is_dir() and not old.is_symlink() and not final.exists():
        os.rename(old, final)


def tidy(folder: Path, step: int, keep: int, keep_best: int, complete: bool = True) -> None:
    """Delete what the checkpoint of ``step``, which is whole everywhere, makes superfluous.

    The newest ``keep`` up to ``step`` stay, and the ``keep_best`` with the lowest ``val_loss``. Those of later steps
    stay too: the run was taken up from an earlier one, and will replace them. Damaged ones count as none and go with
    those that are too many. ``complete``: all of a checkpoint's files must be here.
    """
    shutil.rmtree(_aside(folder, name_of(step)), ignore_errors=True)
    found = [path for number, path in steps(folder) if number <= step]
    whole: dict[Path, float] = {}
    for path in found:
        if len(whole) < max(1, keep) or keep_best:  # no more are read than must be
            loss = _val_loss(path, complete)
            whole |= {path: loss} if loss is not None else {}
    kept = {*list(whole)[: max(1, keep)], *_best(whole, keep_best)}
    for path in found if whole else ():
        if path not in kept:
            _drop(path)


def _drop(path: Path) -> None:
    """Delete a checkpoint, which is called one no more before the first of its files goes."""
    hidden = path.with_name(f".{path.name}.deleted")
    shutil.rmtree(hidden, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.rename(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def _best(losses: Mapping[Path, float], count: int) -> list[Path]:
    """Return the ``count`` with the lowest figures, of equals the first; those without a finite one never count."""
    known = [path for path, loss in losses.items() if math.isfinite(loss)]
    return sorted(known, key=lambda path: losses[path])[:count]


def _val_loss(path: Path, complete: bool) -> float | None:
    """Return a checkpoint's ``val_loss``, infinite where it has none; None where it is damaged."""
    try:
        manifest, _ = read_manifest(path, complete)
        loss = manifest.get("metrics", {}).get("val_loss")
        return math.inf if loss is None else float(loss)
    except (HvdlmError, OverflowError, OSError):
        return None


def sweep(folder: Path, wanted: Collection[str] = ()) -> None:
    """Put in order what a run that was killed left behind.

    What was set aside comes back where nothing came in its place. What was half-written goes, unless its name is
    ``wanted``, because on another node it has become whole: then all of its files had been written here too.
    """
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        hidden = _HIDDEN.fullmatch(path.name)
        if not hidden and not path.name.startswith(MARKER) and path.name != ".latest.partial":
            continue
        with contextlib.suppress(OSError):
            if hidden and hidden[2] == "replaced":
                _put_back(folder, hidden[1])
            elif hidden and hidden[1] in wanted and not (folder / hidden[1]).exists():
                os.rename(path, folder / hidden[1])
            _delete(path)


def put_back(folder: Path) -> None:
    """Bring back every checkpoint that was set aside and not replaced."""
    for path in folder.glob(".step-*.replaced") if folder.is_dir() else ():
        with contextlib.suppress(OSError):
            _put_back(folder, path.name[1:].removesuffix(".replaced"))


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
