"""Building Horovod: a small real build, the checks before it, and the selection of the compiler."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from builders import write_executable
from hvdlm_horovod import build, mpi, patches, target, toolchain
from hvdlm_horovod.console import BuildError

# A build of a source distribution like Horovod's with one small file.

SETUP = """
from setuptools import Extension, find_packages, setup
setup(name="horovod", version="0.28.1", packages=find_packages(), python_requires=">=3.6",
      ext_modules=[Extension("horovod.small", ["horovod/common/small.cc"], language="c++")])
"""
SMALL_CC = """#include <Python.h>
#include <vector>
static std::vector<int> some(3);
static PyModuleDef small = {PyModuleDef_HEAD_INIT, "small", nullptr, -1, nullptr};
extern "C" PyObject* PyInit_small() { return PyModule_Create(&small); }
"""


def write_source(tmp_path: Path, content: str) -> None:
    source = tmp_path / "horovod-0.28.1"
    (source / "horovod" / "common").mkdir(parents=True)
    (source / "setup.py").write_text(SETUP)
    (source / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: horovod\nVersion: 0.28.1\n")
    (source / "horovod" / "__init__.py").write_text("")
    (source / "horovod" / "common" / "__init__.py").write_text("")
    (source / "horovod" / "common" / "small.cc").write_text(content)
    (tmp_path / "index").mkdir()
    with tarfile.open(tmp_path / "index" / "horovod-0.28.1.tar.gz", "w:gz") as archive:
        archive.add(source, source.name)


def logs(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "hvdlm" / "logs").glob("horovod-*.log"))


def request_for(build_target: target.Target, **options: str) -> build.Request:
    installation = mpi.find(build_target)
    assert installation is not None
    return build.Request(("torch",), installation, **options)


@pytest.mark.parametrize("family", ["g++", "clang++"])
def test_a_broken_source_is_explained_in_three_lines(
    family: str, build_target: target.Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [family, *(f"{family}-{number}" for number in range(22, 13, -1))]
    compiler = next((name for name in names if shutil.which(name)), None)
    if compiler is None:
        pytest.skip(f"no {family} here")
    monkeypatch.setenv("CXX", compiler)
    write_source(tmp_path, SMALL_CC.replace("std::vector<int>", "std::vectr<int>"))
    with pytest.raises(BuildError) as raised:
        build.horovod(build_target, request_for(build_target))
    lines = str(raised.value).splitlines()
    assert lines[0].startswith("Horovod failed: horovod/common/small.cc:3: ") and "vectr" in lines[0]
    assert lines[1].startswith("compiler: ") and re.search(r"\d+\.\d+", lines[1])
    assert lines[2].startswith("what to do: ")
    assert lines[3] == f"log: {logs(tmp_path)[0]}" and len(lines) == 4
    assert "vectr" in logs(tmp_path)[0].read_text()
    assert not list((tmp_path / "cache" / "hvdlm" / "wheels").glob("*")), "a failed build leaves nothing behind"


def test_a_build_is_cached_and_records_its_target(
    build_target: target.Target, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_source(tmp_path, SMALL_CC)
    wheel = build.horovod(build_target, request_for(build_target))
    with zipfile.ZipFile(wheel) as archive:
        recorded: dict = {}
        exec(archive.read("horovod/hvdlm_build.py"), recorded)
        assert any(name.endswith(".so") for name in archive.namelist())
    assert recorded["BUILD"]["torch"] == build_target.packages["torch"]
    assert recorded["BUILD"]["patches"] == patches.digest()
    (tmp_path / "index" / "horovod-0.28.1.tar.gz").unlink()
    assert build.horovod(build_target, request_for(build_target)) == wheel
    assert "from the cache" in capfd.readouterr().out
    other = build.Request(("torch",), dataclasses.replace(request_for(build_target).mpi, identity="another MPI"))
    with pytest.raises(BuildError, match="No matching distribution found for horovod"):  # nothing in the cache matches
        build.horovod(build_target, other)


def test_without_pythons_headers_nothing_is_compiled(build_target: target.Target, tmp_path: Path) -> None:
    write_source(tmp_path, SMALL_CC)
    bare = dataclasses.replace(build_target, include=tmp_path / "include")
    with pytest.raises(BuildError) as raised:
        build.horovod(bare, request_for(build_target))
    first = str(raised.value).splitlines()[0]
    assert (
        "has no headers here" in first
        and "Python.h" in first
        and "python3.11-dev" in first.replace(".".join(build_target.version.split(".")[:2]), "3.11")
    )
    assert not logs(tmp_path)


def test_cpath_may_name_a_copy_of_pythons_headers(
    build_target: target.Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = dataclasses.replace(build_target, include=tmp_path / "include")
    (tmp_path / "copy").mkdir()
    monkeypatch.setenv("CPATH", f"{tmp_path}:{tmp_path / 'copy'}")
    with pytest.raises(BuildError, match="or set CPATH to the folder of a copy"):
        toolchain.check_headers(bare)
    (tmp_path / "copy" / "Python.h").touch()
    toolchain.check_headers(bare)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system of 1 MB needs root")
def test_without_disk_space_nothing_is_compiled(
    build_target: target.Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True, timeout=60
    ).returncode:
        pytest.skip("this container may not mount")
    try:
        write_source(tmp_path, SMALL_CC)
        monkeypatch.setenv("XDG_CACHE_HOME", str(small))
        with pytest.raises(
            BuildError, match=r"no disk space: building Horovod needs 1\.5 GB in .*small.*XDG_CACHE_HOME"
        ):
            build.horovod(build_target, request_for(build_target))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("TMPDIR", str(small))
        monkeypatch.setattr("tempfile.tempdir", None)
        with pytest.raises(BuildError, match=r"no disk space: the compiler's temporary files .*TMPDIR"):
            build.horovod(build_target, request_for(build_target))
    finally:
        subprocess.run(["umount", str(small)], check=True, timeout=60)


# Compilers


def test_a_missing_compiler_is_named_with_an_alternative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match=r"needs a C\+\+ compiler, and none is on PATH.*--backend mpi4py"):
        toolchain.find(str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-g++ -O2")
    with pytest.raises(BuildError, match="CXX is 'no-such-g\\+\\+'"):
        toolchain.find()


def test_cxx_selects_the_compiler_and_its_c_counterpart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ -fno-plt")
    monkeypatch.delenv("CC", raising=False)
    compiler = toolchain.find()
    assert compiler.command == ("g++", "-fno-plt") and re.search(r"\d+\.\d+", compiler.version)
    env = compiler.environment({})
    assert env["CXX"] == "g++ -fno-plt" and env["CC"] == "gcc"


def test_an_old_compiler_is_refused_before_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = write_executable(
        tmp_path / "g++",
        '[ "$1" = --version ] && echo "g++ (GCC) 4.8.5" && exit 0\n'
        "echo \"g++: error: unrecognized command line option '-std=c++20'\" >&2; exit 1",
    )
    monkeypatch.setenv("CXX", old)
    with pytest.raises(BuildError) as raised:
        toolchain.find()
    lines = str(raised.value).splitlines()
    assert "-std=c++20" in lines[0] and "4.8.5" in lines[1] and "GCC 11" in lines[2]


def test_libcxx_is_replaced_by_libstdcxx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A stand-in for a Clang whose default is libc++.
    clang = write_executable(
        tmp_path / "clang++",
        'for a; do case "$a" in --version) echo "clang version 19.1"; exit 0;; -stdlib=libstdc++) exit 0;; esac; done\n'
        'echo "probe.cc:8:2: error: the compiler uses libc++" >&2; exit 1',
    )
    monkeypatch.setenv("CXX", f"{clang} -stdlib=libc++")
    compiler = toolchain.find()
    assert compiler.command == (clang,) and compiler.environment({})["CXXFLAGS"] == "-stdlib=libstdc++"


@pytest.mark.parametrize(
    "flags, jobs",
    [("-j1", 1), (" -j3 --jobserver-auth=3,4", 3), ("", None), (" -- FRAMEWORKS=torch", None), ("w", None)],
)
def test_the_number_of_jobs_follows_make_or_the_machine(
    flags: str, jobs: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(os, "sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else 10 * 2**30 // 4096)
    assert build._jobs(flags) == (5 if jobs is None else jobs)
