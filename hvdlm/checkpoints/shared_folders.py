"""Detects which ranks share a checkpoint folder, and how much disk space each folder has.

A run's folder may be shared by all ranks or be local to every node; ranks that see each other's marker files share it.
The lowest of them leads: it does what is done once per folder.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdlm.io import safe_files
from hvdlm.io.lock_owner import host
from hvdlm.protocols.world import World

MARKER = ".rank-"
"""Prefix of a marker file's name."""


@dataclass(frozen=True)
class Sharing:
    """The ranks that share a folder with ``rank``. ``leaders``: for every rank the lowest one with the same folder."""

    rank: int
    leaders: tuple[int, ...]

    @property
    def leads(self) -> bool:
        """Whether this rank does what is done once per folder."""
        return self.leaders[self.rank] == self.rank

    @property
    def everywhere(self) -> bool:
        """Whether all ranks share one folder."""
        return len(set(self.leaders)) == 1

    @property
    def mates(self) -> tuple[int, ...]:
        """The ranks that share this rank's folder, itself included."""
        return tuple(r for r, leader in enumerate(self.leaders) if leader == self.leaders[self.rank])


def meet(folder: Path, world: World) -> Sharing:
    """Return which ranks share ``folder``, which is created where it is missing. All ranks call.

    Every rank creates a marker file and looks up all others by name: names that were never looked up before are not in
    the caches of network file systems. Where a marker can't be created (the folder is read-only), folders are the same
    where they are the same directory of the same host.
    """
    if world.size == 1:
        attempt(lambda: folder.mkdir(parents=True, exist_ok=True))
        return Sharing(0, (0,))
    token = world.broadcast_object(secrets.token_hex(8) if world.rank == 0 else None)
    names = [f"{MARKER}{rank:04d}-{token}" for rank in range(world.size)]

    def create_marker() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[world.rank]).touch()

    answers = world.gather_objects([attempt(create_marker), _identity(folder)])
    visible = world.gather_objects([rank for rank, name in enumerate(names) if (folder / name).exists()])
    attempt(lambda: safe_files.delete_file(folder / names[world.rank]))
    if any(error for error, _ in answers):
        identities = [identity or [rank] for rank, (_, identity) in enumerate(answers)]
        return Sharing(world.rank, tuple(identities.index(identity) for identity in identities))
    leaders: list[int] = []
    for rank, others in enumerate(visible):
        lowest = min((other for other in others if rank in visible[other]), default=rank)
        leaders.append(leaders[lowest] if lowest < rank else rank)
    return Sharing(world.rank, tuple(leaders))


def _identity(folder: Path) -> list[Any] | None:
    """Return what identifies a directory on all ranks of one host; None where there is none."""
    try:
        stat = folder.stat()
    except OSError:
        return None
    return [host(), stat.st_dev, stat.st_ino]


def attempt(action: Callable[[], Any]) -> str | None:
    """Call ``action``; return the description of its OSError, or None."""
    try:
        action()
    except OSError as error:
        return describe(error)
    return None


def describe(error: OSError) -> str:
    """Return what failed, and with which file."""
    return f"{error.strerror or error} ({error.filename or 'the checkpoint'})"


def disk_space(folder: Path) -> dict[str, Any]:
    """Return the host, the device and the free bytes of a folder's file system; free is None where it is unknown."""
    stats = os.statvfs(folder)
    free = stats.f_bavail * stats.f_frsize if stats.f_blocks else None
    return {"host": host(), "device": folder.stat().st_dev, "free": free}


def insufficient_space(
    sharing: Sharing, needs: Sequence[int], spaces: Sequence[Mapping[str, Any] | None]
) -> tuple[int, int, int] | None:
    """Return (leader, bytes needed, bytes free) of the first file system that lacks space, or None.

    ``needs``: the bytes that every rank will write; ``spaces``: every leader's ``disk_space``. Ranks that share a
    folder share its file system, and folders of one host may share one, too.
    """
    systems: dict[tuple[Any, ...], tuple[int, int, int]] = {}
    for rank, need in enumerate(needs):
        leader = sharing.leaders[rank]
        space = spaces[leader]
        if space is None or space["free"] is None:
            continue
        system = (space["host"], space["device"])
        first, needed, free = systems.get(system, (leader, 0, space["free"]))
        systems[system] = (first, needed + need, min(free, space["free"]))
    return next((system for system in systems.values() if system[1] > system[2]), None)
