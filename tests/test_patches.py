"""Edits to Horovod's source: how they are applied, and their effect on horovodrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from builders import write_executable
from hvdlm_horovod import patches
from hvdlm_horovod.edit import Edit
from launching import environment

TWO = (Edit("a.txt", "one", "1", "digits"), Edit("a.txt", "two", "2", "digits"))


def test_every_edit_changes_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one two three")
    monkeypatch.setattr(patches, "EDITS", TWO)
    patches.apply(tmp_path)
    assert (tmp_path / "a.txt").read_text() == "1 2 three"


@pytest.mark.parametrize("text, times", [("one", 0), ("one two two", 2)])
def test_patches_refuse_an_unexpected_source(
    text: str, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text(text)
    monkeypatch.setattr(patches, "EDITS", TWO)
    with pytest.raises(SystemExit, match=f"a.txt holds 'two' {times} times, expected once"):
        patches.apply(tmp_path)


def test_the_digest_changes_with_an_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "EDITS", TWO)
    before = patches.digest()
    monkeypatch.setattr(patches, "EDITS", (TWO[0], TWO[1]._replace(new="II")))
    assert patches.digest() != before


MPIRUN = """import json, os, sys
if sys.argv[1:] == ["--version"]:
    print({version!r})
else:
    with open({record!r}, "w") as file:
        json.dump(sys.argv[1:], file)
"""
OPEN_MPI = "mpirun (Open MPI) 5.0.11"
MPICH = "HYDRA build details:\n    Version: 5.0.2\n    Launchers available: ssh rsh fork"


@pytest.mark.parametrize("version, option", [(OPEN_MPI, "--tag-output"), (MPICH, "-l")])
def test_horovodrun_passes_portable_binding_options(version: str, option: str, tmp_path: Path) -> None:
    """Open MPI 5 takes options with one dash for a program's name; the mpirun of MPICH calls itself HYDRA."""
    pytest.importorskip("horovod")
    record = tmp_path / "arguments.json"
    write_executable(tmp_path / "mpirun", MPIRUN.format(version=version, record=str(record)), sys.executable)
    env = environment()
    env["PATH"] = f"{tmp_path}{os.pathsep}{env['PATH']}"
    done = subprocess.run(
        ["horovodrun", "-np", "2", "--mpi", "true"], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    arguments = json.loads(record.read_text())
    assert " --bind-to none --map-by slot " in f" {' '.join(arguments)} "
    assert option in arguments
    assert arguments[-1] == "true"


def test_horovodrun_leaves_the_exit_code_to_its_reader() -> None:
    """A second waitpid took it from the thread that asks for it, which then got 0."""
    runner = pytest.importorskip("horovod.runner.common.util.safe_shell_exec")
    command = subprocess.Popen(["sleep", "60"])
    runner.terminate_executor_shell_and_children(command.pid)
    assert command.wait(timeout=10) in {-signal.SIGTERM, -signal.SIGKILL}
