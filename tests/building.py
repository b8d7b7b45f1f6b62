"""An environment to build in, and programs that stand for compilers, MPIs and CUDA."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from hvdlm_horovod import build, patches, target


def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> target.Target:
    """Return this environment, with a cache of its own, no package index and no patches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(patches, "EDITS", ())
    (tmp_path / "tools.txt").write_text("")
    monkeypatch.setattr(build, "TOOLS", tmp_path / "tools.txt")
    return target.inspect(sys.executable)


def program(path: Path, script: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def make_mpi(folder: Path, version: str, show: str = "g++ -lmpi") -> None:
    program(folder / "mpicc", f'echo "{show}"')
    program(folder / "mpicxx", f'echo "{show}"')
    program(folder / "mpirun", f'echo "{version}"')
