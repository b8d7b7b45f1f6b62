"""Whether torch.compile can work here: it writes C++ for a CPU and C for a GPU, and calls a compiler for it.

Without a twin: TensorFlow's compiler (XLA) needs no other program.
"""

from __future__ import annotations

import os
import shutil

import torch


def missing_compiler(device: torch.device) -> str:
    """Return the compilers of which torch.compile needs one on PATH for ``device``; ``""`` where one is there."""
    if device.type == "cpu":
        names = [os.environ.get("CXX") or "g++"]  # torch tries no other
    else:
        names = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    return "" if any(shutil.which(name) for name in names) else " or ".join(names)


def compiles(requested: bool | None, device: torch.device, rank: int) -> bool:
    """Return whether to compile; where that is requested and impossible, rank 0 prints why."""
    missing = missing_compiler(device) if requested else ""
    if missing and rank == 0:
        print(f"hvdlm: train.compile is off: torch.compile needs a compiler, and {missing} is not on PATH.", flush=True)
    return bool(requested) and not missing
