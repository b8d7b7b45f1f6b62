"""An isolated environment to build Horovod for, and stub programs of MPI installations."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from builders import write_executable
from hvdlm_horovod import build, patches, target


def isolated_target(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> target.Target:
    """Return this environment with an empty cache, no package index and no patches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(patches, "EDITS", ())
    (tmp_path / "tools.txt").write_text("")
    monkeypatch.setattr(build, "TOOLS", tmp_path / "tools.txt")
    return target.inspect(sys.executable)


def make_mpi(folder: Path, version: str, show: str = "g++ -lmpi") -> None:
    write_executable(folder / "mpicc", f'echo "{show}"')
    write_executable(folder / "mpicxx", f'echo "{show}"')
    write_executable(folder / "mpirun", f'echo "{version}"')
