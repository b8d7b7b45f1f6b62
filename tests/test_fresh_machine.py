"""Tests of what scripts/fresh_machine.sh says before it makes anything. The roots themselves: make fresh."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from launching import ROOT

SCRIPT = ROOT / "scripts" / "fresh_machine.sh"


def refused(*arguments: str, **env: str) -> str:
    """Return the one line with which the script refuses ``arguments``."""
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
        ((), {}, "the first argument is a suite of Debian: bookworm, trixie or sid, not ''"),
        (("noble",), {}, "not 'noble'"),
        (("trixie",), {"COMPILER": "icpx"}, "COMPILER is g++ or clang++, with a version or not, not 'icpx'"),
    ],
)
def test_options_that_are_not_known_are_named(arguments: tuple[str, ...], env: dict[str, str], words: str) -> None:
    assert words in refused(*arguments, **env)


def test_who_is_not_root_is_told_so(tmp_path: Path) -> None:
    program = tmp_path / "id"
    program.write_text("#!/bin/sh\necho 1000\n")
    program.chmod(0o755)
    assert "made by root alone" in refused("trixie", PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


def test_a_machine_without_debootstrap_is_told_its_package(tmp_path: Path) -> None:
    (tmp_path / "id").write_text("#!/bin/sh\necho 0\n")
    (tmp_path / "id").chmod(0o755)
    for name in ("bash", "env"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    assert "apt-get install debootstrap" in refused("trixie", PATH=str(tmp_path))


def test_the_script_is_sound() -> None:
    done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
