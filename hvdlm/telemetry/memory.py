"""How much memory this process took at most."""

from __future__ import annotations

import resource
import sys


def peak_memory_bytes() -> int:
    """Return the largest resident size of this process so far, in bytes (Linux counts it in KiB, macOS in bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
