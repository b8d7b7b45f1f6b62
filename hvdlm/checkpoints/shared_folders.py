"""Which ranks' checkpoint folders are one and the same, and how much room there is: found out, never asked for.

A run's folder may be shared by all ranks or be another one on every node; ranks that see each other's markers share
it. The lowest of them leads: what is done once to a folder, it does.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdlm.protocols.world import World

MARKER = ".rank-"
"""How a marker's name begins."""


@dataclass(frozen=True)
class Sharing:
    """Who shares a folder with ``rank``. ``leaders``: for every rank the lowest one whose folder is the same."""

    rank: int
    leaders: tuple[int, ...]

    @property
    def leads(self) -> bool:
        """Whether this rank does what is done once to its folder."""
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
    """Return who shares ``folder``, which is made where it is missing. All ranks call.

    Every rank leaves a marker and looks for all others' by name: names that nobody has asked for before are answered
    by network file systems without their caches. Where a marker can't be left (a folder that is only read), folders
    count as one where they are the same directory of one host.
    """
    if world.size == 1:
        attempt(lambda: folder.mkdir(parents=True, exist_ok=True))
        return Sharing(0, (0,))
    token = world.broadcast_object(secrets.token_hex(8) if world.rank == 0 else None)
    names = [f"{MARKER}{rank:04d}-{token}" for rank in range(world.size)]

    def leave() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[world.rank]).touch()

    said = world.gather_objects([attempt(leave), _identity(folder)])
    seen = [rank for rank, name in enumerate(names) if (folder / name).exists()]
    everyone = world.gather_objects(seen)
    attempt(lambda: (folder / names[world.rank]).unlink(missing_ok=True))
    if any(error for error, _ in said):
        identities = [identity or [rank] for rank, (_, identity) in enumerate(said)]
        return Sharing(world.rank, tuple(identities.index(identity) for identity in identities))
    leaders: list[int] = []
    for rank, own in enumerate(everyone):
        lowest = min((other for other in own if rank in everyone[other]), default=rank)
        leaders.append(leaders[lowest] if lowest < rank else rank)
    return Sharing(world.rank, tuple(leaders))


def _identity(folder: Path) -> list[Any] | None:
    """Return what names a directory on all ranks of one host; None where there is none."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return [host(), found.st_dev, found.st_ino]


def host() -> str:
    """Return a name of this machine that no other one has."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()}/{boot}"


def attempt(action: Callable[[], Any]) -> str | None:
    """Do it; return what went wrong with a file, or None."""
    try:
        action()
    except OSError as error:
        return explain(error)
    return None


def explain(error: OSError) -> str:
    """Return what went wrong with a file, and with which."""
    return f"{error.strerror or error} ({error.filename or 'the checkpoint'})"


def room(folder: Path) -> dict[str, Any]:
    """Return the host, the device and the free bytes of a folder's file system; None where it doesn't tell."""
    stats = os.statvfs(folder)
    free = stats.f_bavail * stats.f_frsize if stats.f_blocks else None
    return {"host": host(), "device": folder.stat().st_dev, "free": free}


def too_little(
    sharing: Sharing, needs: Sequence[int], rooms: Sequence[Mapping[str, Any] | None]
) -> tuple[int, int, int] | None:
    """Return (leader, bytes needed, bytes free) of the first file system that lacks space, or None.

    ``needs``: what every rank will write; ``rooms``: what every leader found (``room``). Ranks that share a folder
    share its file system, and so may folders of one host.
    """
    systems: dict[tuple[Any, ...], tuple[int, int, int]] = {}
    for rank, need in enumerate(needs):
        leader = sharing.leaders[rank]
        found = rooms[leader]
        if found is None or found["free"] is None:
            continue
        system = (found["host"], found["device"])
        first, sum_of, free = systems.get(system, (leader, 0, found["free"]))
        systems[system] = (first, sum_of + need, min(free, found["free"]))
    return next((found for found in systems.values() if found[1] > found[2]), None)
