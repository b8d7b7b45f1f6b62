"""Detection of the MPI and CUDA installations that Horovod is built against."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from build_stubs import make_mpi
from builders import write_executable
from hvdlm_horovod import build, cuda, mpi, target
from hvdlm_horovod.console import BuildError

# MPI


def test_the_mpi_on_path_is_found_and_changes_the_build_key(build_target: target.Target, tmp_path: Path) -> None:
    make_mpi(tmp_path / "a", "mpirun (Open MPI) 5.0.7", "g++ -I/opt/ompi/include -L/opt/ompi/lib -lmpi")
    make_mpi(tmp_path / "b", "HYDRA build details:  Version:  4.3.0")
    first, second = (mpi.find(build_target, str(tmp_path / name)) for name in "ab")
    assert first and second
    assert (first.version, second.version) == ("Open MPI 5.0.7", "MPICH 4.3.0")
    assert first.rpath == ["/opt/ompi/lib"], "a module's libmpi is found without LD_LIBRARY_PATH"
    requests = [build.Request(("torch",), installation) for installation in (first, second)]
    keys = [build.horovod_key(build_target, request, None) for request in requests]
    assert keys[0] != keys[1]
    assert mpi.find(build_target, str(tmp_path / "nothing")) is None


def test_an_mpi_without_a_cxx_wrapper_is_named(build_target: target.Target, tmp_path: Path) -> None:
    write_executable(tmp_path / "mpicc", "true")
    with pytest.raises(BuildError, match=r"no C\+\+ wrapper .*development package"):
        mpi.find(build_target, str(tmp_path))


def test_mpi_wheels_are_located_relative_to_the_library(build_target: target.Target, tmp_path: Path) -> None:
    make_mpi(tmp_path / "bin", "mpirun (Open MPI) 5.0.11")
    environment_of = dataclasses.replace(build_target, prefix=tmp_path, packages={"mpich": "5.0.2", "torch": "2"})
    installation = mpi.find(environment_of, str(tmp_path / "bin"))
    assert installation and installation.identity == "pypi mpich 5.0.2"
    entries = build.rpath(build.Request(("torch",), installation))
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
def test_mpi_series_are_read_from_launchers_and_libraries(text: str, series: str) -> None:
    assert mpi.series(text) == series


def test_installed_libraries_have_no_path_of_the_build() -> None:
    package = target.inspect(sys.executable).site / "horovod"
    libraries = [*package.glob("torch/mpi_lib_v2*.so"), *package.glob("tensorflow/mpi_lib*.so")]
    assert libraries
    for library in libraries:
        shown = subprocess.run(
            ["readelf", "-d", str(library)], capture_output=True, text=True, check=True, timeout=60
        ).stdout
        entries = re.findall(r"\(R(?:UN)?PATH\).*\[(.*)\]", shown)
        assert ".venv" not in "".join(entries), f"{library.name}: {entries}"


# CUDA


def make_cuda(folder: Path, version: str = "13.0", codes: str = "75 80 86 87 90 100 121") -> cuda.Cuda:
    listed = "\\n".join(f"sm_{code}" for code in codes.split())
    script = (
        f'case "$1" in --version) echo "Cuda compilation tools, release {version}, V{version}.88";;\n'
        f"--list-gpu-code) printf '{listed}\\n';; --dryrun) echo '#$ TOP={folder}/bin/..' >&2;; esac"
    )
    write_executable(folder / "bin" / "nvcc", script)
    return cuda.find({"HOROVOD_CUDA_HOME": str(folder)})


def test_nvcc_is_found_by_variable_by_path_and_behind_a_script(tmp_path: Path) -> None:
    installed_cuda = make_cuda(tmp_path / "cuda-13.0")
    assert installed_cuda.version == "13.0" and installed_cuda.home == tmp_path / "cuda-13.0"
    write_executable(tmp_path / "bin" / "nvcc", f'exec {tmp_path}/cuda-13.0/bin/nvcc "$@"')
    assert cuda.find({"PATH": str(tmp_path / "bin")}).home == tmp_path / "cuda-13.0"
    with pytest.raises(BuildError, match="CUDA_HOME is /nowhere"):
        cuda.find({"CUDA_HOME": "/nowhere"})


def test_a_framework_of_another_cuda_is_refused_before_the_build(tmp_path: Path) -> None:
    installed_cuda = make_cuda(tmp_path, "12.4")
    with pytest.raises(BuildError, match=r"torch 2\.14\.1\+cu130 was built for CUDA 13\.0, .*nvcc is CUDA 12\.4: set"):
        cuda.check_version("torch", "2.14.1+cu130", "13.0", installed_cuda)
    with pytest.raises(
        BuildError, match=r"torch 2\.13\.0\+cpu was built without CUDA: install a torch built for CUDA 12"
    ):
        cuda.check_version("torch", "2.13.0+cpu", "None", installed_cuda)
    cuda.check_version("torch", "2.14.1", "12.8", installed_cuda)  # minor versions work together


def test_gpu_architectures_come_from_nvcc_or_the_user(tmp_path: Path) -> None:
    installed_cuda = make_cuda(tmp_path)
    assert cuda.architectures(installed_cuda, {}) == "75,80,86,90,100"
    assert cuda.architectures(installed_cuda, {"HOROVOD_BUILD_CUDA_CC_LIST": "90"}) == "90"
    with pytest.raises(BuildError, match="HOROVOD_BUILD_CUDA_CC_LIST"):
        cuda.architectures(make_cuda(tmp_path, codes="20 30"), {})


def test_nccl_comes_from_the_system_or_from_torchs_dependency(build_target: target.Target, tmp_path: Path) -> None:
    installed_cuda = make_cuda(tmp_path / "cuda")
    site = dataclasses.replace(build_target, site=tmp_path / "site")
    if not Path("/usr/include/nccl.h").exists():
        with pytest.raises(BuildError, match="HOROVOD_NCCL_HOME"):
            cuda.nccl(site, installed_cuda, tmp_path / "work", {})
        package = tmp_path / "site" / "nvidia" / "nccl"
        (package / "include").mkdir(parents=True)
        (package / "include" / "nccl.h").write_text("")
        (package / "lib").mkdir()
        (package / "lib" / "libnccl.so.2").write_text("library")
        nccl = cuda.nccl(site, installed_cuda, tmp_path / "work", {})
        assert nccl.home and (nccl.home / "lib" / "libnccl.so").read_text() == "library"
        assert (nccl.home / "include" / "nccl.h").exists()
        assert nccl.rpath == ("$ORIGIN/../../nvidia/nccl/lib",)
        other = dataclasses.replace(site, site=tmp_path / "empty", search=(str(tmp_path / "site"),))
        nccl = cuda.nccl(other, installed_cuda, tmp_path / "other", {})  # torch lies in another environment
        assert nccl.home and nccl.rpath == (str(package / "lib"),)
    write_executable(installed_cuda.home / "include" / "nccl.h", "")
    write_executable(installed_cuda.home / "lib64" / "libnccl.so", "")
    assert cuda.nccl(site, installed_cuda, tmp_path / "more", {}).home == installed_cuda.home
    assert cuda.nccl(site, installed_cuda, tmp_path / "more", {"HOROVOD_NCCL_HOME": "/opt/nccl"}).home is None
