"""Peak memory of this process."""

from __future__ import annotations

import resource
import sys


def peak_memory_bytes() -> int:
    """Return the peak resident size of this process in bytes (the system reports KiB on Linux, bytes on macOS)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
