"""Checks before a build: the compiler, make, Python's headers and disk space."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hvdlm_horovod.console import BuildError, NoCompilerError, first_line, output_of
from hvdlm_horovod.target import Target

NO_COMPILER_NEEDED = "training with --backend mpi4py needs no Horovod and no compiler"
# Measured: sources, objects and the wheel of one build; with CUDA, device objects for every architecture besides.
BUILD_BYTES = 1_500_000_000
CUDA_BUILD_BYTES = 3_000_000_000
TEMPORARY_BYTES = 200_000_000  # of the compiler

_CANDIDATES = ("c++", "g++", "clang++")
# torch's headers need C++20; torch and TensorFlow from PyPI are built with GCC's standard library.
_PROBE = """
#include <string>
#include <version>
#if __cplusplus < 202002L
#error the compiler does not know C++20
#endif
#ifdef _LIBCPP_VERSION
#error the compiler uses libc++
#endif
std::string text("text");
"""


@dataclass(frozen=True)
class Toolchain:
    """A C++ compiler: its command (as in CXX), the first line of its version, and flags that it needs."""

    command: tuple[str, ...]
    version: str
    flags: tuple[str, ...] = ()

    @property
    def shown(self) -> str:
        """The version and the command, for messages."""
        return f"{self.version} ({shlex.join([*self.command, *self.flags])})"

    def environment(self, env: dict[str, str]) -> dict[str, str]:
        """Return ``env`` with CXX and CC set to this compiler."""
        env = dict(env, CXX=shlex.join(self.command))
        if self.flags:
            env["CXXFLAGS"] = " ".join([*self.flags, env.get("CXXFLAGS", "")]).strip()
        c_compiler = _c_compiler(self.command)
        if c_compiler:
            env.setdefault("CC", c_compiler)
        return env


def find(path: str | None = None) -> Toolchain:
    """Return the compiler in CXX, else the first on PATH, after checking that it compiles C++20.

    Raises:
        BuildError: there is none, or it can't compile what the frameworks' headers need.
    """
    path = os.environ.get("PATH", os.defpath) if path is None else path
    command = (
        shlex.split(os.environ.get("CXX", "")) or [name for name in _CANDIDATES if shutil.which(name, path=path)][:1]
    )
    if not command:
        raise NoCompilerError(
            "Horovod needs a C++ compiler, and none is on PATH: install one (Debian: g++, Fedora: gcc-c++, conda: "
            f"cxx-compiler); {NO_COMPILER_NEEDED}"
        )
    if not shutil.which(command[0], path=path):
        raise BuildError(f"CXX is {command[0]!r}, which is not on PATH: set CXX to a C++ compiler, or unset it")
    version = first_line(output_of([*command, "--version"]))
    errors = _probe(command)
    if "the compiler uses libc++" in errors:
        return _with_libstdcxx(command, version)
    if errors:
        raise BuildError(
            f"{_probe_failure(errors)}\ncompiler: {version} ({shlex.join(command)})\n{_probe_advice(errors)}"
        )
    return Toolchain(tuple(command), version)


def _with_libstdcxx(command: list[str], version: str) -> Toolchain:
    """Return the same compiler with GCC's standard library, which the frameworks' wheels are built with."""
    flag = "-stdlib=libstdc++"
    command = [word for word in command if not word.startswith("-stdlib=")]
    if _probe([*command, flag]):
        raise BuildError(
            f"the compiler uses libc++, and finds no libstdc++, which PyPI's torch and TensorFlow are built with\n"
            f"compiler: {version} ({shlex.join(command)})\n"
            "what to do: install GCC's standard library (Debian: libstdc++-dev of your release, or g++)"
        )
    return Toolchain(tuple(command), version, (flag,))


def _probe(command: list[str]) -> str:
    """Return the errors of a small compilation; "" if it succeeds."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cc"
        source.write_text(_PROBE)
        compile_it = [*command, "-std=c++20", "-c", str(source), "-o", str(source.with_suffix(".o"))]
        try:
            done = subprocess.run(compile_it, capture_output=True, text=True, errors="replace", timeout=120)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"error: {error}"
        return (done.stderr or f"error: exit code {done.returncode}") if done.returncode else ""


def _probe_failure(errors: str) -> str:
    lines = [line for line in errors.splitlines() if "error" in line]
    return f"the compiler fails on ten lines of C++20: {(lines or [first_line(errors)])[0]}"


def _probe_advice(errors: str) -> str:
    if "c++20" in errors.lower():
        return f"what to do: install GCC 11 or Clang 14, or newer, and set CXX=/path/to/g++; {NO_COMPILER_NEEDED}"
    return "what to do: repair the compiler's installation, or choose another: CXX=/path/to/g++"


def _c_compiler(command: tuple[str, ...]) -> str:
    """Return the C compiler that belongs to a C++ compiler (g++-13: gcc-13, clang++: clang); "" if there is none."""
    path = Path(command[-1] if len(command) > 1 and not command[-1].startswith("-") else command[0])
    for cxx, cc in (("clang++", "clang"), ("g++", "gcc"), ("c++", "cc")):
        if path.name.find(cxx) >= 0:
            name = str(path.with_name(path.name.replace(cxx, cc)))
            return name if shutil.which(name) else ""
    return ""


def check(target: Target, folder: Path, gpu: bool) -> None:
    """Check make, Python's headers and free disk space in ``folder`` and for temporary files.

    Raises:
        BuildError: one is missing.
    """
    if not shutil.which("make", path=target.environment()["PATH"]):
        raise BuildError("make is needed to build Horovod, and is not on PATH: install it (Debian and Fedora: make)")
    check_headers(target)
    check_disk(folder, CUDA_BUILD_BYTES if gpu else BUILD_BYTES, "building Horovod")
    advice = "set TMPDIR to a folder on a larger disk"
    check_disk(Path(tempfile.gettempdir()), TEMPORARY_BYTES, "the compiler's temporary files", advice)


def check_headers(target: Target) -> None:
    """Check that the headers of the target's Python are installed, or that CPATH names the folder of a copy.

    Raises:
        BuildError: they are missing.
    """
    header = target.include / "Python.h"
    copies = [Path(folder) / "Python.h" for folder in os.environ.get("CPATH", "").split(os.pathsep) if folder]
    if not any(path.is_file() for path in (header, *copies)):
        major, minor = target.version.split(".")[:2]
        raise BuildError(
            f"Python {target.version} has no headers here ({header} is missing), which Horovod's C++ includes: install "
            f"them (Debian: python{major}.{minor}-dev, Fedora: python{major}-devel), or set CPATH to the folder of a "
            f"copy, or use a Python that has them (conda's and uv's do); {NO_COMPILER_NEEDED}"
        )


def check_disk(
    folder: Path, needed: int, purpose: str, advice: str = "set XDG_CACHE_HOME to a folder on a larger disk"
) -> None:
    """Check that the file system of ``folder``, which need not exist yet, has ``needed`` bytes free.

    Raises:
        BuildError: it has less.
    """
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise BuildError(
            f"no disk space: {purpose} needs {needed / 1e9:.1f} GB in {existing}, {free / 1e9:.2f} GB are free: free "
            f"some, or {advice}"
        )
