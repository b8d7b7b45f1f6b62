"""All ranks agree on the checkpoint to resume from: the newest whole one, its hashes verified, its files on every node.

Where every node has a folder of its own, a node that lacks files of a checkpoint (because ranks elsewhere wrote them,
or because it is new) receives them from ranks that have them. Every decision follows from gathered values alone, so
that all ranks take the same one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from hvdlm.checkpoints import retention, shared_folders
from hvdlm.checkpoints.discovery import locate, print_skipped, require_none
from hvdlm.checkpoints.errors import CheckpointError
from hvdlm.checkpoints.load import Checkpoint, open_checkpoint
from hvdlm.checkpoints.manifest import MANIFEST, read_manifest
from hvdlm.checkpoints.order import merged, newest_first, pending, sequence_numbers, set_aside_folders, step_of, stored
from hvdlm.checkpoints.shared_folders import Sharing
from hvdlm.errors import HvdlmError
from hvdlm.io import safe_files, untrusted_input
from hvdlm.io.atomic_files import sha256, sync, sync_folder
from hvdlm.protocols.world import World

_CHUNK = 64 * 2**20  # bytes of a file that are broadcast at a time

Report = Mapping[str, Any]
"""A leader's report on a checkpoint: its ``sequence`` number, and the ``digest`` of its manifest, or None with the
``reason`` and the ``kind`` of the error."""


def choose(run: Path, which: str, world: World, excluded: Collection[int] | None = None) -> Checkpoint | None:
    """Return the checkpoint that ``checkpoint.resume`` names: none, auto (the newest whole one of ``run``), or a path.

    Damaged ones are skipped, with a line on rank 0's stderr, and without one those of the ``excluded`` steps, to which
    a rollback doesn't return; then None also means that nothing else is left. ``auto`` also cleans up what a killed run
    left behind. All ranks call and get the same checkpoint, or the same error.

    Raises:
        HvdlmError: the checkpoint that is named can't be read, or all are damaged, or a node can't write a copy.
    """
    if which == "none":
        return None
    folder, name = _locate(run, which, world)
    if not world.any((folder / (name or "")).is_dir()):
        if name is not None:
            raise CheckpointError(Path(which), f"it has no {MANIFEST}", "missing")
        require_none(folder, which, None)
        return None
    sharing = shared_folders.meet(folder, world)
    gathered = _survey(folder, name, sharing, world, clean_up=which == "auto")
    numbers = merged([{key: report["sequence"] for key, report in reports.items()} for reports in gathered])
    newest_error = None
    for candidate in newest_first(numbers):
        if step_of(candidate) in (excluded or ()):
            continue
        # A node that has an earlier one of the same step lacks this one.
        reports = [_of_sequence(reports.get(candidate), numbers[candidate]) for reports in gathered]
        result = _Candidate(folder / candidate, sharing, world, reports).open()
        if isinstance(result, Checkpoint):
            return result
        if name is not None:
            raise result
        if world.rank == 0:
            print_skipped(result)
        newest_error = newest_error or result
    require_none(folder, which, newest_error, excluded is None and world.any(bool(set_aside_folders(folder))))
    return None


def _of_sequence(report: Report | None, number: int | None) -> Report | None:
    return report if report and stored(report["sequence"]) in (stored(number), None) else None


def _locate(run: Path, which: str, world: World) -> tuple[Path, str | None]:
    """Return ``discovery.locate`` for all ranks: ``which`` is a run if it is one on any node."""
    folder, name = locate(run, which)
    if which != "auto" and world.any(name is None):
        folder, name = Path(which) / "checkpoints", None
    return folder, name


def _survey(folder: Path, name: str | None, sharing: Sharing, world: World, clean_up: bool) -> list[dict[str, Report]]:
    """Return every rank's reports on the checkpoints in its folder, by name; those of leaders alone aren't empty."""
    if sharing.leads and clean_up:
        retention.restore_replaced(folder)
    reports, leaving = {}, {}
    if sharing.leads:
        numbers = {name: None} if name is not None else sequence_numbers(folder)
        reports = {key: _report(folder / key, number) for key, number in numbers.items() if (folder / key).is_dir()}
        leaving = pending(folder) if name is None else {}
    answers = world.gather_objects([reports, leaving])
    # What a killed run had begun to set aside on one node counts on none.
    aside = {(key, number) for _, leaving in answers for key, number in leaving.items()}
    gathered = [{k: r for k, r in reports.items() if (k, stored(r["sequence"])) not in aside} for reports, _ in answers]
    if clean_up:
        if sharing.leads:
            whole = {key for reports in gathered for key, report in reports.items() if report["digest"]}
            retention.clean_up(folder, whole)
        world.gather_objects(None)  # a barrier: folders are renamed before any rank reads them
    return gathered


def _report(path: Path, sequence: int | None) -> Report:
    try:
        read_manifest(path, complete=False)
        return {"sequence": sequence, "digest": sha256(path / MANIFEST)}
    except CheckpointError as error:
        return {"sequence": sequence, "digest": None, "reason": error.reason, "kind": error.kind}
    except OSError as error:
        return {"sequence": sequence, "digest": None, "reason": shared_folders.describe(error), "kind": "damaged"}


@dataclass
class _Candidate:
    """A checkpoint that may be whole. ``reports``: every rank's (``_survey``), None of those that have none."""

    path: Path
    sharing: Sharing
    world: World
    reports: Sequence[Report | None]

    def open(self) -> Checkpoint | CheckpointError:
        """Return it, verified and with all files in this rank's folder; or what is wrong with it. All ranks call."""
        readable = [rank for rank, report in enumerate(self.reports) if report and report["digest"]]
        if not readable:
            report = next(report for report in self.reports if report)
            return CheckpointError(self.path, report["reason"], report["kind"])
        if len({report["digest"] for report in self.reports if report and report["digest"]}) > 1:
            return CheckpointError(self.path, f"rank {readable[0]} and others have different manifests of it")
        files = self._files(readable[0])
        intact, flaws = self._verify(files)
        lost = next((file for file in files if not any(file in names for names in intact)), None)
        if lost is not None or not files:
            return CheckpointError(self.path, flaws[lost] if lost in flaws else "its manifest is gone")
        self._copy_missing(files, intact, readable)
        return self._open_everywhere()

    def _files(self, root: int) -> dict[str, Any]:
        """Return the manifest's ``files``, as rank ``root`` reads them; empty where it no longer can."""
        try:
            files = read_manifest(self.path, complete=False)[0]["files"] if self.world.rank == root else {}
        except CheckpointError:
            files = {}
        return self.world.broadcast_object(files, root)

    def _verify(self, files: Mapping[str, Any]) -> tuple[list[list[str]], dict[str, str]]:
        """Hash every file in every folder once, the ranks that share a folder dividing the work.

        Return for every rank the files that it found intact, and by name what is wrong with others, here or elsewhere.
        """
        mates = self.sharing.mates
        assigned = sorted(files)[mates.index(self.world.rank) :: len(mates)]
        checked = {file: _flaw(self.path / file, files[file]["sha256"]) for file in assigned}
        gathered = self.world.gather_objects(checked)
        flaws: dict[str, tuple[str, str]] = {}
        for file, flaw in (item for answer in gathered for item in answer.items()):
            # A file that is damaged on some node says more than one that is missing on another.
            if flaw and (file not in flaws or flaws[file][0] == "missing"):
                flaws[file] = flaw
        intact = [[file for file, flaw in answer.items() if not flaw] for answer in gathered]
        return intact, {file: reason for file, (_, reason) in flaws.items()}

    def _copy_missing(self, files: Mapping[str, Any], intact: Sequence[Sequence[str]], readable: Sequence[int]) -> None:
        """Copy to every folder the files that it lacks, from a rank that has them. All ranks call.

        Raises:
            HvdlmError: a node can't write a copy.
        """
        leaders = self.sharing.leaders
        held = {leader: {MANIFEST} if leader in readable else set() for leader in leaders}
        for rank, names in enumerate(intact):
            held[leaders[rank]] |= {*names}
        here = held[self.world.rank] if self.sharing.leads else {*files, MANIFEST}
        digests = {file: entry["sha256"] for file, entry in files.items()}
        digests[MANIFEST] = self.reports[readable[0]]["digest"]  # type: ignore[index]
        error = None
        for file in [*sorted(files), MANIFEST]:  # the manifest last, as when a checkpoint is written
            if all(file in names for names in held.values()):
                continue
            root = readable[0] if file == MANIFEST else next(r for r, names in enumerate(intact) if file in names)
            copy = None if file in here or error else _Copy(self.path / file, digests[file])
            self._broadcast(file, root, copy)
            error = error or (copy and copy.end())
        for rank, failure in enumerate(self.world.gather_objects(error)):
            if failure:
                raise HvdlmError(
                    f"rank {rank} could not copy what its node lacks of checkpoint {self.path}: {failure}. Free space "
                    "or repair the folder there."
                )

    def _broadcast(self, file: str, root: int, copy: _Copy | None) -> None:
        """Broadcast a file of rank ``root`` in chunks to all ranks that make a copy. All ranks call."""
        with contextlib.ExitStack() as stack:
            source = None
            if self.world.rank == root:
                with contextlib.suppress(OSError):
                    source = stack.enter_context((self.path / file).open("rb"))
            while data := self.world.broadcast_bytes(_read_chunk(source), root):
                if copy:
                    copy.add(data)

    def _open_everywhere(self) -> Checkpoint | CheckpointError:
        """Return it as this rank opens it, or what is wrong on the first rank that can't. All ranks call."""
        checkpoint = error = None
        try:
            checkpoint = replace(open_checkpoint(self.path), verified=True)
        except CheckpointError as failure:
            error = failure.reason
        for rank, reason in enumerate(self.world.gather_objects(error)):
            if reason:
                return CheckpointError(self.path, f"as rank {rank} sees it, {reason}")
        assert checkpoint is not None
        return checkpoint


def _flaw(path: Path, digest: str) -> tuple[str, str] | None:
    """Return what is wrong with a file, as ("missing" or "damaged", the reason), or None."""
    try:
        if path.parent.is_symlink():
            untrusted_input.inside(path.parent, path.parent.parent)
        untrusted_input.size(path, within=path.parent)
        return None if sha256(path) == digest else ("damaged", f"{path.name} has another SHA-256")
    except FileNotFoundError:
        return "missing", f"{path.name} is missing"
    except ValueError as error:
        return "damaged", str(error)
    except OSError as error:
        return "damaged", shared_folders.describe(error)


def _read_chunk(source: BinaryIO | None) -> bytes:
    """Return the next chunk; empty at the end and where reading fails: the hash of the copy tells which."""
    try:
        return source.read(_CHUNK) if source else b""
    except OSError:
        return b""


class _Copy:
    """A file that is received in chunks, and renamed to its final name once its hash is verified."""

    def __init__(self, path: Path, digest: str) -> None:
        self._path = path
        self._expected = digest
        self._temporary = path.with_name(f".{path.name}.partial")
        self._digest = hashlib.sha256()
        self._file: BinaryIO | None = None
        self._error = shared_folders.attempt(self._open)

    def _open(self) -> None:
        if self._path.parent.is_symlink():
            raise OSError(errno.ELOOP, "is a symbolic link", str(self._path.parent))
        self._path.parent.mkdir(exist_ok=True)
        self._file = safe_files.create(self._temporary)

    def add(self, data: bytes) -> None:
        """Append the next chunk."""
        self._digest.update(data)
        self._error = self._error or shared_folders.attempt(lambda: self._file and self._file.write(data))

    def end(self) -> str | None:
        """Rename the file to its final name; return what failed, or None."""
        error = self._error or shared_folders.attempt(self._close)
        with contextlib.suppress(OSError):
            safe_files.delete_file(self._temporary)
            if self._file:
                self._file.close()
        return error

    def _close(self) -> None:
        if self._file:
            sync(self._file)
        if self._digest.hexdigest() != self._expected:
            raise OSError(errno.EIO, "arrived with another SHA-256", self._path.name)
        os.replace(self._temporary, self._path)
        sync_folder(self._path.parent)
