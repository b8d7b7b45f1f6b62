"""Sets aside the checkpoints that a run leaves behind when it is resumed from another one than its newest.

They are renamed to ``checkpoints/set-aside-BRANCH/step-...``, where nothing takes them for checkpoints of the run, and
where neither retention nor anything else but ``log.overwrite`` deletes them. A file lists them first: from then on they
are no longer in the order of the folder's checkpoints, even if the run is killed between two renames.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdlm.checkpoints import shared_folders
from hvdlm.checkpoints.load import Checkpoint
from hvdlm.checkpoints.manifest import FORMAT, MANIFEST
from hvdlm.checkpoints.order import (
    LATEST,
    PENDING,
    SET_ASIDE_PATTERN,
    STEP_PATTERN,
    Numbers,
    merged,
    named_latest,
    newest_first,
    pending,
    read_pending,
    sequence_numbers,
    set_aside_folders,
    step_name,
    step_of,
    stored,
)
from hvdlm.checkpoints.shared_folders import Sharing
from hvdlm.errors import HvdlmError
from hvdlm.io import safe_files
from hvdlm.io.atomic_files import replace, sync_folder
from hvdlm.protocols.world import World


@dataclass
class Branch:
    """What a run saves between two resumptions from another checkpoint than its newest; ``id``: 16 hexadecimal digits.

    ``sequence``: that of the last checkpoint in the run's folder; the next one has the next number.
    """

    id: str = "0" * 16
    sequence: int = 0

    def next_entry(self) -> dict[str, Any]:
        """Return the entries of the next checkpoint's manifest."""
        self.sequence += 1
        return {"branch": self.id, "sequence": self.sequence}


def continue_from(checkpoint: Checkpoint | None, folder: Path, world: World, sharing: Sharing | None) -> Branch:
    """Return the branch to which a run that resumes from ``checkpoint`` (None: starts) adds. All ranks call.

    Checkpoints in ``folder`` that were written after it, or are of later steps, are set aside; all of them where
    ``checkpoint`` isn't in ``folder``. Rank 0 says so.

    Args:
        checkpoint: the one whose state the run has.
        folder: the checkpoints of the run.
        world: all ranks.
        sharing: the ranks that share ``folder``; None where it doesn't exist yet.

    Raises:
        HvdlmError: a rank can't set them aside.
    """
    name = step_name(checkpoint.step) if checkpoint else None
    leads = sharing is not None and sharing.leads
    answers = world.gather_objects(_survey(folder, name, checkpoint) if leads else _NOTHING)
    _raise_first(answers)
    numbers = merged([answer["numbers"] for answer in answers])
    name = name if name in numbers and all(answer["holds"] for answer in answers) else None
    leaving = _left_behind(numbers, name)
    manifest = checkpoint.manifest if checkpoint and checkpoint.manifest["format"] == FORMAT else {}
    known = [*numbers.values(), *(answer["last"] for answer in answers)]
    new = world.broadcast_object(secrets.token_hex(8) if world.rank == 0 else None)
    if leaving:
        _set_aside(leaving, name, f"set-aside-{new}", folder, world, leads)
        if world.rank == 0:
            print(_sentence(checkpoint, leaving, folder / f"set-aside-{new}"), flush=True)
    if leads and name and named_latest(folder) != name:
        with contextlib.suppress(OSError):  # a run was killed before it updated the file
            replace(folder / LATEST, name)
    continued = manifest.get("branch", new) if name and not leaving else new
    return Branch(continued, max(number or 0 for number in known))


_NOTHING: dict[str, Any] = {"error": None, "numbers": {}, "last": 0, "holds": True}


def _survey(folder: Path, name: str | None, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """Complete what a killed run had begun; return the checkpoints that remain in ``folder``."""
    error = shared_folders.attempt(lambda: _complete(folder, name))
    holds = checkpoint is not None and _same(folder / step_name(checkpoint.step), checkpoint.path)
    return {"error": error, "numbers": sequence_numbers(folder), "last": _last_set_aside(folder), "holds": holds}


def _left_behind(numbers: Numbers, name: str | None) -> list[str]:
    """Return the names that were written after ``name``, or are of later steps; all where it is None."""
    if name not in numbers:
        return sorted(numbers, key=step_of)
    names = newest_first(numbers)
    later = names[: names.index(name)] + [other for other in names if step_of(other) > step_of(name)]
    return sorted({*later}, key=step_of)


def _same(path: Path, other: Path) -> bool:
    """Return whether two folders hold the same checkpoint."""
    try:
        return path.samefile(other) or (path / MANIFEST).read_bytes() == (other / MANIFEST).read_bytes()
    except OSError:
        return False


def _last_set_aside(folder: Path) -> int:
    numbers = [number for path in set_aside_folders(folder) for number in sequence_numbers(path).values()]
    return max([0, *(number for number in numbers if number)])


def _set_aside(names: Sequence[str], newest: str | None, target: str, folder: Path, world: World, leads: bool) -> None:
    """Rename the checkpoints ``names``; ``newest``: the one that ``latest`` names then. All ranks call.

    All nodes have listed theirs before the first rename: if the run is killed meanwhile, the next one renames the rest.

    Raises:
        HvdlmError: a rank can't.
    """
    numbers = sequence_numbers(folder) if leads else {}
    held = {name: stored(number) for name, number in numbers.items() if name in names}

    def announce() -> None:
        replace(folder / PENDING, json.dumps({"target": target, "newest": newest, "numbers": held}))
        sync_folder(folder)

    answers = world.gather_objects({"error": shared_folders.attempt(announce) if held else None})
    if held and any(answer["error"] for answer in answers):
        with contextlib.suppress(OSError):
            safe_files.delete_file(folder / PENDING)
    _raise_first(answers)
    error = shared_folders.attempt(lambda: _complete(folder, None)) if held else None
    _raise_first(world.gather_objects({"error": error}))


def _complete(folder: Path, resumed: str | None) -> None:
    """Rename the checkpoints that ``PENDING`` lists, then delete it; nothing is renamed if ``resumed`` is among them.

    Raises:
        OSError: one can't be renamed.
    """
    content, remaining = read_pending(folder), sequence_numbers(folder)
    target, newest = str(content.get("target")), str(content.get("newest"))
    names = [name for name in pending(folder) if name not in remaining and re.fullmatch(STEP_PATTERN, name)]
    foreign = not re.fullmatch(SET_ASIDE_PATTERN, target) or (folder / target).is_symlink()
    if not foreign and resumed not in names:
        (folder / target).mkdir(exist_ok=True)
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # renamed before the run was killed
                os.rename(folder / name, folder / target / name)
        sync_folder(folder / target)
        if newest in remaining:
            replace(folder / LATEST, newest)
        else:
            safe_files.delete_file(folder / LATEST)
        sync_folder(folder)
    safe_files.delete_file(folder / PENDING)


def _raise_first(answers: Sequence[dict[str, Any]]) -> None:
    for rank, answer in enumerate(answers):
        if answer["error"]:
            raise HvdlmError(
                f"rank {rank} could not set aside the later checkpoints: {answer['error']}. Free space or repair the "
                "folder there; no checkpoint is lost."
            )


def _sentence(checkpoint: Checkpoint | None, names: Sequence[str], target: Path) -> str:
    start = f"resumes from {checkpoint.path}" if checkpoint else "starts from scratch"
    steps = ", ".join(str(step_of(name)) for name in names[:8]) + (", ..." if len(names) > 8 else "")
    return (
        f"hvdlm: the run {start}: {len(names)} other checkpoint(s), of step {steps}, are set aside in {target}; delete "
        "that folder when you don't need them."
    )
