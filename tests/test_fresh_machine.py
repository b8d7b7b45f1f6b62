"""Checks of scripts/fresh_machine.sh before it creates anything; ``make fresh`` builds the roots."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from builders import write_executable
from launching import ROOT

SCRIPT = ROOT / "scripts" / "fresh_machine.sh"


def refused(*arguments: str, **env: str) -> str:
    """Return the line with which the script refuses ``arguments``."""
    done = subprocess.run(
        [str(SCRIPT), *arguments], env={**os.environ, **env}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    return line


@pytest.mark.parametrize(
    "arguments, env, words",
    [
        ((), {}, "the first argument must be a Debian suite: bookworm, trixie or sid, not ''"),
        (("noble",), {}, "not 'noble'"),
        (("trixie",), {"COMPILER": "icpx"}, "COMPILER must be g++ or clang++, optionally with a version, not 'icpx'"),
    ],
)
def test_unknown_options_are_named(arguments: tuple[str, ...], env: dict[str, str], words: str) -> None:
    assert words in refused(*arguments, **env)


def test_root_is_required(tmp_path: Path) -> None:
    write_executable(tmp_path / "id", "echo 1000")
    assert "only root can create" in refused("trixie", PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


def test_a_missing_debootstrap_is_named_with_its_package(tmp_path: Path) -> None:
    write_executable(tmp_path / "id", "echo 0")
    for name in ("bash", "env"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    assert "apt-get install debootstrap" in refused("trixie", PATH=str(tmp_path))


def test_the_script_passes_shellcheck() -> None:
    done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
