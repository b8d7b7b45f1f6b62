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


def remember() -> None:
    """Let this process and its forks read entry points again only where a folder of the path has changed."""
    read: Any = importlib.metadata.entry_points
    known: dict[Any, Any] = {}

    def entry_points(**wanted: Any) -> Any:
        folders = [
            folder for folder in dict.fromkeys(folder or "." for folder in sys.path) if describes_packages(folder)
        ]
        key = (*((folder, os.stat(folder).st_mtime_ns) for folder in folders), *wanted.items())
        if key not in known:
            known[key] = read(**wanted)
        return known[key]

    importlib.metadata.entry_points = entry_points
