"""The user's cache folder, also where there is no home folder, and folders whose names are similar to a missing one's.

Standard library only: ``make setup`` imports it.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import os
import stat
import tempfile
from pathlib import Path


def user_cache() -> Path:
    """Return hvdlm's folder in the user's cache folder: in ``XDG_CACHE_HOME``, or else ``~/.cache``.

    Without a home folder that can be written (containers run with any user id), it is a private folder below the
    temporary folder, the same one for every process of this user.
    """
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "hvdlm"
    try:
        cache = Path.home() / ".cache" / "hvdlm"
    except (RuntimeError, KeyError):  # HOME is unset and the user id has no passwd entry
        return _temporary()
    return cache if can_write(cache) else _temporary()


def can_write(folder: Path) -> bool:
    """Return whether ``folder`` can be written, or made where it does not exist."""
    existing = next(f for f in (folder, *folder.parents) if os.path.exists(f))  # Path.exists may raise PermissionError
    return os.path.isdir(existing) and os.access(existing, os.W_OK | os.X_OK)


def similar_run(folder: Path) -> str:
    """Return " Did you mean FOLDER?" of a run whose folder has a name like that of ``folder``; "" where none has."""
    runs: dict[str, Path] = {}
    for parent in (folder.absolute().parent, Path("runs").absolute()):
        with contextlib.suppress(OSError):
            runs |= {path.name: path for path in sorted(parent.iterdir()) if (path / "config.yaml").is_file()}
    close = difflib.get_close_matches(folder.name, [name for name in runs if runs[name] != folder.absolute()], 1)
    return f" Did you mean {os.path.relpath(runs[close[0]])}?" if close else ""


@functools.cache
def _temporary() -> Path:
    folder = Path(tempfile.gettempdir()) / f"hvdlm-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
        return folder
    # Somebody else has made a folder of this name: what lies there must not be installed or trained on.
    return Path(tempfile.mkdtemp(prefix="hvdlm-"))
