"""What is installed, remembered: a command of hvdlm asks a dozen times, each of which reads some hundred small files."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from typing import Any


def remember() -> None:
    """Let this process and its forks read entry points again only where a folder of the path has changed."""
    read, known = importlib.metadata.entry_points, {}

    def entry_points(**wanted: Any) -> Any:
        folders = [folder or "." for folder in sys.path]
        state = tuple((folder, os.stat(folder).st_mtime_ns) for folder in folders if os.path.exists(folder))
        if (state, *wanted.items()) not in known:
            known[state, *wanted.items()] = read(**wanted)
        return known[state, *wanted.items()]

    importlib.metadata.entry_points = entry_points
