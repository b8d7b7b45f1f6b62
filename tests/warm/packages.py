"""What is installed, remembered: a command of hvdlm asks a dozen times, and each time hundreds of files are read."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from typing import Any


def remember() -> None:
    """Let this process and its forks read entry points again only where a folder of the path has changed."""
    read: Any = importlib.metadata.entry_points
    known: dict[Any, Any] = {}
    described: dict[tuple[str, int], bool] = {}

    def describes_packages(folder: str, changed: int) -> bool:
        """Return whether a folder or an archive of Python's path may describe installed packages."""
        if (folder, changed) not in described:
            names = os.listdir(folder) if os.path.isdir(folder) else [".egg"]
            described[folder, changed] = any(name.endswith((".dist-info", ".egg-info", ".egg")) for name in names)
        return described[folder, changed]

    def entry_points(**wanted: Any) -> Any:
        paths = dict.fromkeys(os.path.abspath(folder) for folder in sys.path)
        folders = [(folder, os.stat(folder).st_mtime_ns) for folder in paths if os.path.exists(folder)]
        key = (*(folder for folder in folders if describes_packages(*folder)), *wanted.items())
        if key not in known:
            known[key] = read(**wanted)
        return known[key]

    importlib.metadata.entry_points = entry_points
