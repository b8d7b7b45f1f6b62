"""Builds wheels of the patched Horovod and of mpi4py against the same MPI, and installs them."""

from __future__ import annotations

import json
import os
import re
import stat
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

from hvdlm.io.safe_files import create, delete_file, delete_folder
from hvdlm_horovod import cache, cuda, failures, local_launch, patches, toolchain
from hvdlm_horovod.console import BuildError, run, say
from hvdlm_horovod.mpi import Mpi
from hvdlm_horovod.target import Target

TOOLS = Path(__file__).parent / "build_tools.txt"
RUNTIME = ("cloudpickle", "psutil", "PyYAML", "packaging", "cffi")  # packages that Horovod imports
_BUILD_NAMES = {"torch": "PYTORCH", "tensorflow": "TENSORFLOW"}
_FILE_BYTES = 2 * 2**30  # memory that the compiler needs for the largest files
_MPI4PY = "4.1.2"


@dataclass(frozen=True)
class Request:
    """What a wheel is built for: frameworks, MPI, and the value of HOROVOD_GPU_OPERATIONS (empty: none)."""

    frameworks: tuple[str, ...]
    mpi: Mpi
    gpu: str = ""


def wheels(target: Target, request: Request) -> list[Path]:
    """Return the wheels of mpi4py and of the patched Horovod, from the cache or built.

    Raises:
        BuildError: something is missing, or a build failed.
    """
    toolkit = _toolkit(target, request)
    return [mpi4py(target, request.mpi), horovod(target, request, toolkit)]


def _toolkit(target: Target, request: Request) -> cuda.Cuda | None:
    """Return the CUDA toolkit of a build with GPU operations, after checking the frameworks' CUDA; else None."""
    if not request.gpu:
        return None
    toolkit = cuda.find()
    cuda.check_frameworks(target, request.frameworks, toolkit)
    return toolkit


def horovod(target: Target, request: Request, toolkit: cuda.Cuda | None = None) -> Path:
    """Return the wheel of the patched Horovod for ``request``, from the cache or built.

    Raises:
        BuildError: something is missing, or the build failed.
    """
    key = horovod_key(target, request, toolkit)
    return cache.wheel("horovod", key, lambda folder: _build_horovod(folder, target, request, toolkit, key))


def horovod_key(target: Target, request: Request, toolkit: cuda.Cuda | None) -> dict[str, str]:
    """Return everything that a wheel of Horovod depends on."""
    key = _common_key(target, request.mpi) | {"patches": patches.digest(), "gpu_operations": request.gpu}
    for name in request.frameworks:
        installed = target.framework(name)
        assert installed is not None
        key[name] = installed[1]
    if toolkit is not None:
        key["cuda"] = f"{toolkit.home} {toolkit.version} {os.environ.get('HOROVOD_BUILD_CUDA_CC_LIST', '')}"
        packages = [f"{name} {version}" for name, version in target.packages.items() if name.startswith("nvidia-nccl")]
        key["nccl"] = os.environ.get("HOROVOD_NCCL_HOME") or ", ".join(packages)
    return key


def _common_key(target: Target, mpi: Mpi) -> dict[str, str]:
    key = {"python": target.tag, "libc": target.libc, "mpi": mpi.identity}
    if os.environ.get("CXX"):
        key["compiler"] = os.environ["CXX"]
    return key


def _build_horovod(
    folder: Path, target: Target, request: Request, toolkit: cuda.Cuda | None, key: dict[str, str]
) -> None:
    compiler = toolchain.find(target.environment()["PATH"])
    toolchain.check(target, folder, bool(request.gpu))
    log = cache.log("horovod", key)
    delete_file(log)
    gpu = f" with {request.gpu} on GPUs (CUDA {toolkit.version})" if toolkit else ""
    say(
        f"Horovod {patches.VERSION}: building for {' and '.join(request.frameworks)}{gpu}, {request.mpi.version}, "
        f"{compiler.version} (about 5 minutes on 2 cores)"
    )
    work = folder / "work"
    work.mkdir()
    env = compiler.environment(_tools(target, work, log))
    source = _source(target, work, log, env)
    patches.apply(source)
    (source / "horovod" / "hvdlm_build.py").write_text(record(key, compiler, request))
    env = _settings(env, request, work)
    if toolkit is not None:
        env = _gpu_settings(env, target, request, toolkit, work)
    wheel = ["-m", "pip", "--disable-pip-version-check", "wheel", "--verbose", "--no-deps", "--no-build-isolation"]
    run(
        [target.python, *wheel, "-w", str(folder), str(source)],
        log,
        "Horovod",
        lambda output: failures.explain(output, log, target.version, compiler.shown),
        env,
    )
    delete_folder(work)


def _tools(target: Target, work: Path, log: Path) -> dict[str, str]:
    """Install the tools for the build into a folder; return environment variables that put them first.

    The environment's own setuptools, which may be too new for Horovod's setup.py, stays as it is.
    """
    tools = work / "tools"
    target.pip(["install", "--target", str(tools), "-r", str(TOOLS)], log, "tools for the build, in a separate folder")
    env = target.environment()
    env["PYTHONPATH"] = os.pathsep.join(p for p in (str(tools), env.get("PYTHONPATH", "")) if p)
    cmake = tools / "cmake" / "data" / "bin" / "cmake"
    if cmake.is_file():
        env.setdefault("HOROVOD_CMAKE", str(cmake))
    return env


def _source(target: Target, work: Path, log: Path, env: dict[str, str]) -> Path:
    """Download and unpack Horovod's source distribution."""
    download = ["download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "-d", str(work)]
    target.pip([*download, f"horovod=={patches.VERSION}"], log, "Horovod's source distribution", env)
    with tarfile.open(next(work.glob("*.tar.gz"))) as archive:
        if hasattr(tarfile, "data_filter"):
            archive.extractall(work, filter="data")
        else:
            archive.extractall(work)
    return work / f"horovod-{patches.VERSION}"


def _settings(env: dict[str, str], request: Request, work: Path) -> dict[str, str]:
    """Return ``env`` with the variables that Horovod's build reads about MPI and the frameworks."""
    env = dict(
        env,
        CMAKE_POLICY_VERSION_MINIMUM="3.5",  # CMake 4 no longer reads the bundled Gloo's request for CMake 2.8
        HOROVOD_WITH_MPI="1",
        HOROVOD_WITH_GLOO="1",
        HOROVOD_WITHOUT_MXNET="1",
        HOROVOD_CPU_OPERATIONS="MPI",
        HVDLM_RPATH=";".join(rpath(request)),
        PATH=f"{_wrappers(request.mpi, work / 'bin')}{os.pathsep}{env['PATH']}",
    )
    env["MAKEFLAGS"] = f"-j{_jobs(env.get('MAKEFLAGS', ''))}"
    env.pop("HOROVOD_GPU_OPERATIONS", None)
    for name, build_name in _BUILD_NAMES.items():
        for word in ("WITH", "WITHOUT"):
            env.pop(f"HOROVOD_{word}_{build_name}", None)
        env[f"HOROVOD_{'WITH' if name in request.frameworks else 'WITHOUT'}_{build_name}"] = "1"
    return env


def _jobs(flags: str) -> int:
    """Return how many files to compile in parallel: as MAKEFLAGS says, else as cores and memory allow.

    Under make MAKEFLAGS is set, perhaps to nothing, and Horovod's build would then compile 8 files in parallel, or one.
    """
    jobs = re.search(r"(?:^|\s)-j(\d+)", flags)
    if jobs:
        return int(jobs[1])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(cores, 8, memory // _FILE_BYTES))


def rpath(request: Request) -> list[str]:
    """Return where Horovod's libraries look for MPI and PyTorch, relative to themselves or absolute."""
    return [*request.mpi.rpath, *(["$ORIGIN/../../torch/lib"] if "torch" in request.frameworks else [])]


def _wrappers(mpi: Mpi, folder: Path) -> Path:
    """Make a folder with the MPI's programs to put first on PATH, from which CMake takes them."""
    folder.mkdir()
    for name, program in (
        ("mpicc", mpi.mpicc),
        ("mpicxx", mpi.mpicxx),
        ("mpirun", mpi.mpirun),
        ("mpiexec", mpi.mpirun),
    ):
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec "{program}" "$@"\n')
        script.chmod(script.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    return folder


def _gpu_settings(
    env: dict[str, str], target: Target, request: Request, toolkit: cuda.Cuda, work: Path
) -> dict[str, str]:
    library = cuda.nccl(target, toolkit, work) if request.gpu == "NCCL" else None
    codes = cuda.architectures(toolkit)
    origin = f", NCCL: {library.origin}" if library else ""
    say(f"  CUDA {toolkit.version} ({toolkit.home}), architectures {codes}{origin}")
    env = cuda.environment(env, request.gpu, toolkit, library, codes)
    env["HVDLM_RPATH"] = ";".join([*(library.rpath if library else ()), env["HVDLM_RPATH"]])
    return env


def record(key: dict[str, str], compiler: toolchain.Toolchain, request: Request) -> str:
    """Return a module for the wheel that records what it was built from, for ``horovod check``."""
    facts = {**key, "compiler": compiler.version, "mpi": request.mpi.version, "built": time.strftime("%Y-%m-%d")}
    return f'"""What hvdlm built this Horovod for."""\n\nBUILD = {json.dumps(facts, indent=4, sort_keys=True)}\n'


def mpi4py(target: Target, mpi: Mpi) -> Path:
    """Return a wheel of mpi4py built against ``mpi``, from the cache or built.

    The wheels on PyPI load any libmpi at run time, perhaps another one than Horovod.

    Raises:
        BuildError: the build failed.
    """
    key = _common_key(target, mpi) | {"mpi4py": _MPI4PY}
    return cache.wheel("mpi4py", key, lambda folder: _build_mpi4py(folder, target, mpi, cache.log("mpi4py", key)))


def _build_mpi4py(folder: Path, target: Target, mpi: Mpi, log: Path) -> None:
    compiler = toolchain.find(target.environment()["PATH"])
    toolchain.check_headers(target)
    say(f"mpi4py {_MPI4PY}: building against the same MPI")
    delete_file(log)
    env = dict(target.environment(), MPICC=mpi.mpicc)
    env.setdefault("CFLAGS", "-O1")  # measured: 97 s in place of the 173 s of Python's own -O3, for code that calls MPI
    rpaths = ["$ORIGIN/../../.." if entry.startswith("$ORIGIN") else entry for entry in mpi.rpath]
    if rpaths:
        env["LDFLAGS"] = " ".join([env.get("LDFLAGS", ""), *(f"-Wl,-rpath,'{entry}'" for entry in rpaths)]).strip()
    # pip's own cache does not distinguish the MPIs that wheels were built against.
    command = [target.python, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir", "wheel", "--no-deps"]
    run(
        [*command, "--no-binary", "mpi4py", "-w", str(folder), f"mpi4py=={_MPI4PY}"],
        log,
        "mpi4py",
        lambda output: failures.explain(output, log, target.version, compiler.shown),
        env,
    )


def _copy(wheel: Path, path: Path) -> str:
    with create(path) as file:
        file.write(wheel.read_bytes())
    return str(path)


def install(target: Target, wheels: list[Path], output: Path | None = None) -> None:
    """Install the wheels and the packages that Horovod imports; copy the wheels to the folder ``output``.

    Raises:
        BuildError: pip failed.
    """
    if output is not None:
        try:
            output.mkdir(parents=True, exist_ok=True)
            copies = [_copy(wheel, output / wheel.name) for wheel in wheels]
        except OSError as error:
            raise BuildError(f"--output {output}: {error.strerror}: name a writable folder") from error
        say(f"copied to {', '.join(copies)}")
    log = cache.log("pip", target.key)
    target.pip(["install", *RUNTIME], log, "packages that Horovod imports")
    target.pip(["install", "--force-reinstall", "--no-deps", *map(str, wheels)], log, "mpi4py and Horovod")
    local_launch.allow_without_ssh(target.prefix)
