"""Whether torch.compile can work here: it writes C++ for a CPU and C for a GPU, and calls a compiler for it."""

from __future__ import annotations

import os
import shutil

import torch


def missing_compiler(device: torch.device) -> str:
    """Return what torch.compile would call on ``device`` and doesn't find on PATH; empty where it finds a compiler."""
    if device.type == "cpu":
        names = [os.environ.get("CXX") or "g++"]  # torch asks for no other
    else:
        names = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    return "" if any(shutil.which(name) for name in names) else " or ".join(names)


def compiles(wanted: bool | None, device: torch.device, rank: int) -> bool:
    """Return whether to compile; where that is wanted and can't be, rank 0 says so."""
    missing = missing_compiler(device) if wanted else ""
    if missing and rank == 0:
        print(f"hvdlm: train.compile is off: torch.compile needs a compiler, and {missing} is not on PATH.", flush=True)
    return bool(wanted) and not missing
