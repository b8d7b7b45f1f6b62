"""Starts Python on several ranks, as a user would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from hvdlm.probes import THREADS

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("HVDLM_DATA", ROOT.parent / "shared" / "data"))


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment without what pins threads or ranks, with the .venv's programs first."""
    env = {k: v for k, v in os.environ.items() if k not in THREADS and not k.startswith(("OMPI_", "PMIX_", "HOROVOD_"))}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    env.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1", TF_CPP_MIN_LOG_LEVEL="3")
    return env | more


def launch(
    launcher: str, ranks: int, arguments: list[str], timeout: float = 300, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run ``python ARGUMENTS`` on ``ranks`` ranks; with one rank, without a launcher."""
    command = [sys.executable, *arguments]
    if ranks > 1:
        name, *options = launcher.split()
        if name == "mpirun":
            options += ["--oversubscribe", "--bind-to", "none"]
        command = [name, *options, "-np", str(ranks), *command]
    return subprocess.run(command, cwd=ROOT, env=environment(**more), capture_output=True, text=True, timeout=timeout)
