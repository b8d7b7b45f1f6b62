"""Where the measurements of machines are kept: a hardware file for each machine, framework, precision and backend."""

from __future__ import annotations

import platform
import re
from pathlib import Path

from hvdlm.io.machine import cores
from hvdlm.io.user_folders import user_cache

_CPU_INFO = Path("/proc/cpuinfo")


def folder() -> Path:
    """Return the folder of all measurements, in the user's cache folder."""
    return user_cache() / "hardware"


def path_of(device: str, framework: str, precision: str, backend: str) -> Path:
    """Return the hardware file of a machine, whether it exists or not.

    Args:
        device: as a framework names it (``Resolved.device``); ``CPU`` is replaced by the processor's name.
        framework, precision, backend: of the run, each as it was chosen, not ``auto``.
    """
    machine = f"{processor()} {cores()} cores" if device == "CPU" else device
    words = (machine, framework, precision, backend)
    return folder() / ("-".join(re.sub(r"[^\w.]+", "_", word) for word in words) + ".yaml")


def processor() -> str:
    """Return the name of this machine's processor."""
    try:
        lines = _CPU_INFO.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
