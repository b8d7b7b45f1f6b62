"""The owner of a lock, as its file names it: which process of which machine, since when, in which launch and job."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import socket
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

_LIMIT = 4096  # bytes of a lock


def host() -> str:
    """Return this machine's name and the identity of its running system."""
    return f"{socket.gethostname()}/{boot()}"


def boot() -> str:
    """Return the identity of the running system: another one after every start."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return socket.gethostname()


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock, as its file names it.

    Attributes:
        token: distinguishes it from all others.
        host: name of its machine.
        boot: identity of the system that runs there.
        pid: its process id.
        started: when the process started, in the system's own unit; "" where that is unknown.
        since: when it took the lock, in its own time.
        launch: identity of the launch that it is a rank of; "" without a launcher.
        job: the scheduler's job, for people.
        inode: of the lock: in a copy of the folder it differs.
    """

    token: str
    host: str
    boot: str
    pid: int
    started: str
    since: str
    launch: str
    job: str
    inode: int

    def __str__(self) -> str:
        """Return its description for a sentence."""
        details = ", ".join(text for text in (self.since and f"since {self.since}", self.job) if text)
        return f"process {self.pid} on {self.host}" + (f" ({details})" if details else "")


_TYPES: dict[str, type] = {field.name: int if field.name in ("pid", "inode") else str for field in fields(Owner)}


def write(descriptor: int, owner: Owner) -> None:
    """Write ``owner`` into its lock, an open file."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(asdict(owner)).encode(), 0)
    os.fsync(descriptor)


def read(path: Path, descriptor: int) -> Owner | None:
    """Return the owner that a lock names; None where it is empty.

    Raises:
        OSError: it names none: it is no lock of hvdlm.
    """
    data = os.pread(descriptor, _LIMIT, 0).strip(b"\0 \n")  # a crash of the machine may leave zeros behind
    if not data:
        return None
    try:
        values = json.loads(data)
        if type(values["pid"]) is int and type(values["host"]) is str:
            return Owner(**{name: _value(values.get(name), _TYPES[name]) for name in _TYPES})
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise OSError(errno.EEXIST, "it is not a lock that hvdlm wrote: move it elsewhere", str(path))


def _value(value: Any, kind: type) -> Any:
    """Return a value as ``kind``, a default where another version of hvdlm wrote none, without control characters."""
    if type(value) is not kind:
        return kind()
    return "".join(c for c in value if c.isprintable()) if isinstance(value, str) else value


def from_kernel(descriptor: int) -> str | None:
    """Return which process of this machine has locked an open file, as its kernel says; None where it is not known."""
    try:
        locks = Path("/proc/locks").read_text(encoding="ascii")
    except OSError:
        return None
    match = re.search(rf"FLOCK +ADVISORY +WRITE (\d+) \S+:{os.fstat(descriptor).st_ino} ", locks)
    return f"process {match[1]}" if match else None


def this_process(launch: str, job: str, inode: int) -> Owner:
    """Return this process as the owner of a lock, a new one at every call."""
    return Owner(
        token=secrets.token_hex(8),
        host=socket.gethostname(),
        boot=boot(),
        pid=os.getpid(),
        started=_started(os.getpid()),
        since=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        launch=launch,
        job=job,
        inode=inode,
    )


def process_lives(owner: Owner) -> bool:
    """Return whether the process of an owner on this system is alive."""
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return _started(owner.pid) == owner.started


def _started(pid: int) -> str:
    """Return when a process started, in clock ticks since the system did; "" where that is unknown."""
    with contextlib.suppress(OSError, IndexError):
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        state, *values = text.rpartition(")")[2].split()  # a program's name may hold blanks and parentheses
        return "" if state == "Z" else values[18]
    return ""
