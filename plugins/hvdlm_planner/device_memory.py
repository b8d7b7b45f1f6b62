"""The memory of this machine's GPUs, without a framework."""

from __future__ import annotations

import shutil
import subprocess

_LIMIT = 20  # seconds that the driver may take to answer


def device_memory() -> float | None:
    """Return the bytes of this machine's smallest GPU by NVIDIA's driver, or None without one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT, check=True)
        return min(float(line) for line in done.stdout.split("\n") if line.strip()) * 2**20
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
