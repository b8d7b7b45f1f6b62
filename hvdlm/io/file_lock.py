"""Locks on what only one process may write: run folders, token folders, outputs, the build cache.

The lock of ``NAME`` is a small file that names its owner, and that the owner keeps locked (``flock``): the system
releases it when the owner dies, however it dies. On network file systems, where this may work on one host only or not
at all, the owner also touches the file every two seconds. An owner on another host is dead once its file has not
changed for 20 seconds on the watching process's own clock: clocks of two hosts are never compared. A dead owner's lock
is taken over. Standard library only: ``make setup`` imports it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hvdlm.errors import HvdlmError
from hvdlm.io import lock_owner, rank_context, safe_files
from hvdlm.io.lock_owner import Owner

BEAT = 2.0
"""Seconds between two touches of a lock by its owner."""

STALE = 20.0
"""Seconds without a touch after which an owner on another host is dead: below the time-outs of ranks that wait."""

_PATIENCE = 3.0  # seconds in which an owner that is being killed may end
_REPORT, _REPORT_AGAIN = 5.0, 60.0  # seconds of waiting after which a line says for whom
_POLL = 0.2
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


class Held(Exception):
    """Another process holds the lock; ``owner`` is None while it is just taking it, or where nobody knows it."""

    def __init__(self, path: Path, owner: Owner | str | None) -> None:
        super().__init__(f"{path} is held by {owner or 'another process'}")
        self.owner = owner


class FileLock:
    """A lock that this process, or another rank of the same launch, holds.

    Attributes:
        owner: this process, as the lock names it; None where another rank holds the lock.
        taken_over: the dead owner whose lock it was, or None.
        made: the folders that were made for it, the innermost first: deleted with it if they are empty then.
    """

    def __init__(
        self, path: Path, descriptor: int | None = None, owner: Owner | None = None, taken_over: Owner | None = None
    ) -> None:
        self._path = path
        self._descriptor = descriptor
        self.owner = owner
        self._over = threading.Event()
        self._busy = threading.Lock()  # between the thread and ``release``: descriptors are used again once closed
        self.taken_over = taken_over
        self.made: Sequence[Path] = ()
        if descriptor is not None:
            self._key = _key(path)
            _held[self._key] = self
            threading.Thread(target=self._beat, name="hvdlm-lock", daemon=True).start()

    def release(self) -> None:
        """Release the lock and delete its file; a rank that shares it, and a second call, do nothing."""
        with self._busy:
            self._over.set()
            descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        _held.pop(self._key, None)
        with contextlib.suppress(OSError):
            if _is_at(self._path, descriptor):
                safe_files.delete_file(self._path)
        os.close(descriptor)
        for folder in self.made:
            safe_files.delete_if_empty(folder)

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            with self._busy, contextlib.suppress(OSError):  # a network file system may be away for a moment
                if self._descriptor is None:
                    return
                if self._is_lost(self._descriptor):
                    _end(self._path)
                os.utime(self._descriptor)

    def _is_lost(self, descriptor: int) -> bool:
        """Return whether another process has taken the lock over: replaced its file, or written into it."""
        if not safe_files.kind(self._path):
            return False  # deleted with its folder
        return not _is_at(self._path, descriptor) or lock_owner.read(self._path, descriptor) not in (None, self.owner)


def _end(path: Path) -> None:
    """End this process: another one holds the lock and writes what this one would write."""
    text = (
        f"hvdlm: {path} is held by another process now: it was deleted, or this process was suspended for so long that "
        "it was taken for dead; this process ends."
    )
    print(text, file=sys.stderr, flush=True)
    os._exit(1)


_held: dict[tuple[int | None, str], FileLock] = {}
"""The locks that this process holds, by rank, where ranks are threads, and path."""


def _key(path: Path) -> tuple[int | None, str]:
    own = rank_context.current()
    return own.rank if own else None, str(path.resolve())


def _forget() -> None:
    """Close a forked child's copies of descriptors, which would keep locks beyond the death of their owner."""
    for lock in _held.values():
        lock._over.set()
        if lock._descriptor is not None:
            os.close(lock._descriptor)
        lock._descriptor = None
    _held.clear()


os.register_at_fork(after_in_child=_forget)


def beside(path: Path) -> Path:
    """Return the lock of a file or folder ``path`` that lies beside it."""
    return path.with_name(f".{path.name}.lock")


def acquire(
    path: Path,
    wait: bool = False,
    launch: str = "",
    job: str = "",
    shared: bool = True,
    say: Callable[[str], None] | None = None,
    patience: float = math.inf,
) -> FileLock:
    """Take the lock ``path``, or share it with another rank of ``launch``; a process that holds it already shares, too.

    Args:
        path: the lock; its folder exists.
        wait: whether to wait for a living owner.
        launch: identity of this process's launch.
        job: the scheduler's job.
        shared: whether ranks of one launch share it; else they wait for each other, silently.
        say: prints a line: for whom this process waits, and whose lock it took over. Default: to standard error.
        patience: seconds for which a living owner may show no sign of life, as one that was stopped.

    Raises:
        Held: another process holds it, and ``wait`` is False or the owner shows no sign of life.
        OSError: it is a link, isn't a lock of hvdlm, or can't be written.
    """
    if _key(path) in _held:
        return FileLock(path)
    return _Attempt(path, wait, launch, job, say or _print, shared, patience).acquire()


def wait_for_launch(path: Path, launch: str) -> None:
    """Wait until another rank of ``launch`` holds the lock ``path``, at most for as long as that may take."""
    deadline = time.monotonic() + STALE + _PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            descriptor = safe_files.open_regular(path, os.O_RDONLY)
            try:
                owner = lock_owner.read(path, descriptor)
            finally:
                os.close(descriptor)
            if owner and owner.launch == launch:
                return
        time.sleep(_POLL / 4)


def _print(line: str) -> None:
    print(f"hvdlm: {line}", file=sys.stderr, flush=True)


@dataclass
class _Attempt:
    """An attempt to take a lock; see ``acquire``."""

    _path: Path
    _wait: bool
    _launch: str
    _job: str
    _say: Callable[[str], None]
    _shared: bool = True
    _patience: float = math.inf
    _began: float = field(default_factory=time.monotonic)
    _report_after: float = field(default_factory=lambda: _REPORT)
    _seen: tuple[str, int] | None = None  # the owner and its last touch
    _changed: float = 0.0  # when that was first seen

    def acquire(self) -> FileLock:
        while True:
            descriptor = safe_files.open_regular(self._path, os.O_RDWR | os.O_CREAT)
            lock = None
            try:
                lock = self._try(descriptor)
            finally:
                if lock is None or lock._descriptor != descriptor:
                    os.close(descriptor)
            if lock is not None:
                return lock
            time.sleep(_POLL)

    def _try(self, descriptor: int) -> FileLock | None:
        """Return the lock, or None where the next attempt may tell more."""
        locked = _flock(descriptor)
        owner = lock_owner.read(self._path, descriptor)
        touched = self._has_touched(owner, descriptor)
        alive = self._is_alive(owner, descriptor, locked, touched)
        if alive is False:
            return self._take(descriptor, locked, owner)
        together = bool(owner and self._launch and owner.launch == self._launch)
        if together and self._shared:
            return FileLock(self._path)
        waited = time.monotonic() - self._began
        silent = alive and self._silence > self._patience
        if alive and (silent or (not self._wait and waited > _PATIENCE)):
            raise Held(self._path, owner or lock_owner.from_kernel(descriptor))
        if waited > self._report_after and not together:
            self._report_after = waited + _REPORT_AGAIN
            who = owner or lock_owner.from_kernel(descriptor) or "another process"
            doing = "waiting until it is done" if alive else "looking whether it is alive"
            self._say(f"{self._path} is held by {who}: {doing}, {waited:.0f} s so far")
        return None

    def _has_touched(self, owner: Owner | None, descriptor: int) -> bool:
        """Return whether the owner that was seen before has touched its lock since."""
        seen, before = (owner.token if owner else "", os.fstat(descriptor).st_mtime_ns), self._seen
        if seen != before:
            self._seen, self._changed = seen, time.monotonic()
        return before is not None and before[0] == seen[0] and before != seen

    @property
    def _silence(self) -> float:
        """Seconds for which the owner has not touched its lock, by this process's clock."""
        return time.monotonic() - self._changed

    def _is_alive(self, owner: Owner | None, descriptor: int, locked: bool | None, touched: bool) -> bool | None:
        """Return whether the lock's owner is alive; None: not known yet."""
        if owner is None or owner.inode != os.fstat(descriptor).st_ino:  # new, or a copy of another folder's lock
            return locked is False
        if owner.boot == lock_owner.boot():
            return lock_owner.process_lives(owner) if locked is None else not locked
        if touched:
            return True
        return False if self._silence > STALE else None

    def _take(self, descriptor: int, locked: bool | None, dead: Owner | None) -> FileLock | None:
        """Take the lock in place, or replace a file that a dead host still keeps locked; None: another was faster."""
        mine = self._replacement() if locked is False else descriptor
        owner = self._write_owner(mine, locked)
        if owner is None:
            if mine != descriptor:
                os.close(mine)
            return None
        if dead:
            self._say(f"{self._path}: {dead} has ended without releasing this lock: it is taken over")
        return FileLock(self._path, mine, owner, dead)

    def _write_owner(self, descriptor: int, locked: bool | None) -> Owner | None:
        """Write this process's name into the lock and return it; None where another process has done so, too."""
        if not _is_at(self._path, descriptor):
            return None
        owner = lock_owner.this_process(self._launch, self._job, os.fstat(descriptor).st_ino)
        try:
            lock_owner.write(descriptor, owner)
        except OSError:
            safe_files.delete_file(self._path)
            raise
        if locked:
            return owner
        time.sleep(5 * _POLL)  # the kernel doesn't arbitrate: the last of several that write at once wins
        now = lock_owner.read(self._path, descriptor) if _is_at(self._path, descriptor) else None
        return owner if now == owner else None

    def _replacement(self) -> int:
        """Put a new file in the place of the lock; return its descriptor."""
        temporary = self._path.with_name(f"{self._path.name}.{secrets.token_hex(4)}.partial")
        descriptor = safe_files.open_regular(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        _flock(descriptor)
        os.replace(temporary, self._path)
        return descriptor


def _flock(descriptor: int) -> bool | None:
    """Lock a file; return whether it succeeded, None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    """Return whether ``path`` is the open file ``descriptor``."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    return False


def exclusive(output: Path) -> FileLock:
    """Lock the file or folder that ``--output`` names, with a lock beside it.

    Raises:
        HvdlmError: another process is writing it, or the lock can't be written.
    """
    lock = beside(output)
    try:
        return acquire(lock)
    except Held as held:
        raise HvdlmError(
            f"--output {output}: {held.owner or 'another process'} is writing it: wait until it is done, or name "
            "another one."
        ) from None
    except OSError as error:
        raise HvdlmError(
            f"--output {output}: {error.strerror} ({lock.name}, its lock): name one that can be written."
        ) from error
