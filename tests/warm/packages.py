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

    def entry_points(**wanted: Any) -> Any:
        folders = [folder or "." for folder in sys.path]
        state = [(folder, os.stat(folder).st_mtime_ns) for folder in folders if os.path.exists(folder)]
        key = (*state, *wanted.items())
        if key not in known:
            known[key] = read(**wanted)
        return known[key]

    importlib.metadata.entry_points = entry_points
