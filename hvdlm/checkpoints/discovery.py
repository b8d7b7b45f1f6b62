"""All ranks agree on the checkpoint to go on from: the newest that is whole, its hashes verified, its files at hand.

Where every node has a folder of its own, a node that lacks files of a checkpoint (because others wrote them, or it is
new) gets them from those that have them. What is decided here follows from what all ranks were told alone.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from hvdlm.checkpoints import load, retention, shared_folders
from hvdlm.checkpoints.load import Checkpoint
from hvdlm.checkpoints.manifest import read_manifest
from hvdlm.checkpoints.shared_folders import Sharing
from hvdlm.errors import HvdlmError
from hvdlm.io import untrusted_input
from hvdlm.io.atomic_files import sha256, sync, sync_folder
from hvdlm.protocols.world import World

_CHUNK = 64 * 2**20  # what travels at a time
_MANIFEST = "manifest.json"


def choose(run: Path, which: str, world: World) -> Checkpoint | None:
    """Return the checkpoint that ``checkpoint.resume`` names: none, auto (the newest whole one of ``run``), or a path.

    Damaged ones are named on rank 0 and skipped. ``auto`` also puts in order what a killed run left behind. All ranks
    call and get the same one, or the same error.

    Raises:
        HvdlmError: the one that is named is damaged or none, or all are damaged, or a node can't take a copy.
    """
    if which == "none":
        return None
    folder, name = _place(run, which, world)
    if not world.any((folder / (name or "")).is_dir()):
        if which == "auto":
            return None
        raise load.none_yet(which) if name is None else _no_checkpoint(which)
    sharing = shared_folders.meet(folder, world)
    seen = _survey(folder, name, sharing, world, in_order=which == "auto")
    why = None
    for one in sorted({key for reports in seen for key in reports}, key=_number, reverse=True):
        found, error = _Candidate(folder / one, sharing, world, [reports.get(one) for reports in seen]).open()
        if found:
            return found
        if name is None and world.rank == 0:
            load.skip(folder / one, error)
        why = why or error
    if why == "it has no manifest.json" and name is not None:
        raise _no_checkpoint(which)
    if name is not None:
        raise HvdlmError(f"checkpoint {which} is damaged or foreign: {why}. Resume from another one.")
    if why:
        raise load.none_whole(folder, why)
    if which != "auto":
        raise load.none_yet(which)
    return None


def _number(name: str) -> tuple[int, str]:
    digits = name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else 0, name


def _place(run: Path, which: str, world: World) -> tuple[Path, str | None]:
    """Return ``checkpoint.place`` as all ranks see it: a run is one if it is on any node."""
    folder, name = load.place(run, which)
    if which != "auto" and world.any(name is None):
        folder, name = Path(which) / "checkpoints", None
    return folder, name


def _no_checkpoint(which: str) -> HvdlmError:
    return HvdlmError(
        f"{which} is no hvdlm checkpoint: it has no manifest.json. Name a folder like RUN/checkpoints/step-..."
    )


def _survey(folder: Path, name: str | None, sharing: Sharing, world: World, in_order: bool) -> list[dict[str, Any]]:
    """Return, for every leader, what it says of every checkpoint in its folder, by name; ``in_order``: sweep it too.

    A report is {"digest": of the manifest, or None, "why": what is wrong with it, or None}.
    """
    if sharing.leads and in_order:
        retention.put_back(folder)
    paths = [folder / name] if name is not None else [path for _, path in retention.steps(folder)]
    seen = world.gather_objects({path.name: _report(path) for path in paths if path.is_dir()} if sharing.leads else {})
    if in_order:
        if sharing.leads:
            retention.sweep(folder, {key for reports in seen for key, report in reports.items() if report["digest"]})
        world.gather_objects(None)  # before that, nobody looks into a folder that was renamed
    return seen


def _report(path: Path) -> dict[str, str | None]:
    try:
        read_manifest(path, complete=False)
        return {"digest": sha256(path / _MANIFEST), "why": None}
    except HvdlmError as error:
        return {"digest": None, "why": load.reason(error)}
    except OSError as error:
        return {"digest": None, "why": shared_folders.explain(error)}


@dataclass
class _Candidate:
    """A checkpoint that may be whole. ``reports``: what every leader said of it (``_survey``), None of other ranks."""

    path: Path
    sharing: Sharing
    world: World
    reports: Sequence[Mapping[str, Any] | None]

    def open(self) -> tuple[Checkpoint | None, str]:
        """Return it, verified and with all files in this rank's folder; or None and what is wrong. All ranks call."""
        having = [rank for rank, report in enumerate(self.reports) if report and report["digest"]]
        if not having:
            return None, next(report["why"] for report in self.reports if report)
        if len({report["digest"] for report in self.reports if report and report["digest"]}) > 1:
            return None, f"rank {having[0]} and others have different manifests of it"
        files = self._files(having[0])
        good, why = self._verify(files)
        lost = next((file for file in files if not any(file in own for own in good)), None)
        if lost is not None or not files:
            return None, why.get(lost or "", "its manifest is gone")
        self._share(files, good, having)
        return self._opened()

    def _files(self, root: int) -> dict[str, Any]:
        """Return the manifest's ``files``, as rank ``root`` has read them; nothing where it can't any more."""
        try:
            own = read_manifest(self.path, complete=False)[0]["files"] if self.world.rank == root else {}
        except HvdlmError:
            own = {}
        return self.world.broadcast_object(own, root)

    def _verify(self, files: Mapping[str, Any]) -> tuple[list[list[str]], dict[str, str]]:
        """Hash every file in every folder once, by one of those who share it; return who found which to be good.

        And, by name, what is wrong with those that aren't, here or there.
        """
        mates = self.sharing.mates
        own = sorted(files)[mates.index(self.world.rank) :: len(mates)]
        wrong = {file: _flaw(self.path / file, files[file]["sha256"]) for file in own}
        answers = self.world.gather_objects(wrong)
        why: dict[str, str] = {}
        for file, flaw in (item for answer in answers for item in answer.items()):
            if flaw and (file not in why or why[file].endswith("is missing")):
                why[file] = flaw
        return [[file for file, flaw in answer.items() if not flaw] for answer in answers], why

    def _share(self, files: Mapping[str, Any], good: Sequence[Sequence[str]], having: Sequence[int]) -> None:
        """Have every folder get what it lacks from a rank that has it. All ranks call.

        Raises:
            HvdlmError: a node can't write it.
        """
        leaders = self.sharing.leaders
        has = {leader: {_MANIFEST} if leader in having else set() for leader in leaders}
        for rank, own in enumerate(good):
            has[leaders[rank]] |= {*own}
        here = has[self.world.rank] if self.sharing.leads else {*files, _MANIFEST}
        digests = {file: entry["sha256"] for file, entry in files.items()}
        digests[_MANIFEST] = self.reports[having[0]]["digest"]  # type: ignore[index]
        error = None
        for file in [*sorted(files), _MANIFEST]:  # the manifest last, as ever
            if all(file in own for own in has.values()):
                continue
            root = having[0] if file == _MANIFEST else next(r for r, own in enumerate(good) if file in own)
            copy = None if file in here or error else _Copy(self.path / file, digests[file])
            self._send(file, root, copy)
            error = error or (copy and copy.end())
        for rank, said in enumerate(self.world.gather_objects(error)):
            if said:
                raise HvdlmError(
                    f"rank {rank} could not copy what its node lacks of checkpoint {self.path}: {said}. Free space or "
                    "repair the folder there."
                )

    def _send(self, file: str, root: int, copy: _Copy | None) -> None:
        """Hand a file of rank ``root``, bit by bit, to all that make a copy. All ranks call."""
        with contextlib.ExitStack() as stack:
            source = None
            if self.world.rank == root:
                with contextlib.suppress(OSError):
                    source = stack.enter_context((self.path / file).open("rb"))
            while data := self.world.broadcast_bytes(_read(source), root):
                if copy:
                    copy.add(data)

    def _opened(self) -> tuple[Checkpoint | None, str]:
        """Return it as this rank sees it, or what is wrong on the first rank that doesn't. All ranks call."""
        found = error = None
        try:
            found = replace(load.open_checkpoint(self.path), verified=True)
        except HvdlmError as refused:
            error = load.reason(refused)
        errors = self.world.gather_objects(error)
        wrong = next((f"as rank {rank} sees it, {said}" for rank, said in enumerate(errors) if said), None)
        return (None, wrong) if wrong else (found, "")


def _flaw(path: Path, digest: str) -> str | None:
    """Return what is wrong with a file, or None."""
    try:
        if path.parent.is_symlink():
            untrusted_input.inside(path.parent, path.parent.parent)
        untrusted_input.size(path, within=path.parent)
        return None if sha256(path) == digest else f"{path.name} has another SHA-256"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except ValueError as error:
        return str(error)
    except OSError as error:
        return shared_folders.explain(error)


def _read(source: BinaryIO | None) -> bytes:
    """Return the next bytes that travel; none where there are no more, or none can be read: hashes tell which."""
    try:
        return source.read(_CHUNK) if source else b""
    except OSError:
        return b""


class _Copy:
    """A file that comes in bit by bit and takes its place once it is whole, its hash verified."""

    def __init__(self, path: Path, digest: str) -> None:
        self._path, self._wanted = path, digest
        self._temporary = path.with_name(f".{path.name}.partial")
        self._digest = hashlib.sha256()
        self._file: BinaryIO | None = None
        self._error = shared_folders.attempt(self._open)

    def _open(self) -> None:
        if self._path.parent.is_symlink():
            raise OSError(errno.ELOOP, "is a symbolic link", str(self._path.parent))
        self._path.parent.mkdir(exist_ok=True)
        self._file = self._temporary.open("wb")

    def add(self, data: bytes) -> None:
        """Take the next bytes."""
        self._digest.update(data)
        self._error = self._error or shared_folders.attempt(lambda: self._file and self._file.write(data))

    def end(self) -> str | None:
        """Put the file in its place; return what went wrong, if anything did."""
        error = self._error or shared_folders.attempt(self._close)
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)
            if self._file:
                self._file.close()
        return error

    def _close(self) -> None:
        if self._file:
            sync(self._file)
        if self._digest.hexdigest() != self._wanted:
            raise OSError(errno.EIO, "arrived with another SHA-256", self._path.name)
        os.replace(self._temporary, self._path)
        sync_folder(self._path.parent)
