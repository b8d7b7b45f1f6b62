"""What is installed, remembered: a command of hvdlm asks a dozen times, and each time hundreds of files are read."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from typing import Any


def describes_packages(folder: str) -> bool:
    """Return whether a folder or an archive of Python's path may describe installed packages."""
    if not os.path.isdir(folder):
        return os.path.exists(folder)
    return any(name.endswith((".dist-info", ".egg-info", ".egg")) for name in os.listdir(folder))


def changed_at(folder: str) -> int:
    """Return when a folder or an archive was changed, in nanoseconds; 0 if there is none."""
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return 0


def remember() -> None:
    """Let this process and its forks read entry points again only where a folder of the path has changed."""
    read: Any = importlib.metadata.entry_points
    known: dict[Any, Any] = {}
    describe: dict[Any, bool] = {}  # whether a folder described packages when it was changed

    def entry_points(**wanted: Any) -> Any:
        folders = [(folder, changed_at(folder)) for folder in dict.fromkeys(folder or "." for folder in sys.path)]
        for folder in folders:
            if folder not in describe:
                describe[folder] = describes_packages(folder[0])
        key = (*filter(describe.get, folders), *wanted.items())
        if key not in known:
            known[key] = read(**wanted)
        return known[key]

    importlib.metadata.entry_points = entry_points
