"""CUDA's compiler, NCCL and the GPU architectures of a build with GPU operations."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hvdlm_horovod.console import BuildError, output_of
from hvdlm_horovod.target import Target

# Volta to Blackwell: a kernel for each that nvcc supports, and PTX of the newest for later GPUs. The kernels only copy
# and scale; those of 8.0 also run on 8.7 and 8.8.
ARCHITECTURES = (70, 75, 80, 86, 89, 90, 100, 103, 110, 120)
_TORCH_CUDA = "import torch; print(torch.__version__, torch.version.cuda)"
_TENSORFLOW_CUDA = (
    "import tensorflow as tf; print(tf.__version__, tf.sysconfig.get_build_info().get('cuda_version') or None)"
)


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit: its folder, its nvcc and its version, for example 13.0."""

    home: Path
    nvcc: str
    version: str


@dataclass(frozen=True)
class Nccl:
    """NCCL: its folder, the ``rpath`` of the built library, and its ``origin`` in words."""

    home: Path | None
    rpath: tuple[str, ...]
    origin: str


def find(env: Mapping[str, str] = os.environ) -> Cuda:
    """Return the toolkit of HOROVOD_CUDA_HOME or CUDA_HOME, or that of the nvcc on PATH, or ``/usr/local/cuda``.

    Raises:
        BuildError: there is none, or the variable is a folder without nvcc.
    """
    for variable in ("HOROVOD_CUDA_HOME", "CUDA_HOME"):
        if env.get(variable):
            nvcc = Path(env[variable]) / "bin" / "nvcc"
            if not nvcc.is_file():
                raise BuildError(
                    f"{variable} is {env[variable]}, which has no bin/nvcc: set it to CUDA's folder, or unset it"
                )
            return _toolkit(str(nvcc))
    on_path = shutil.which("nvcc", path=env.get("PATH", os.defpath))
    usual = "/usr/local/cuda/bin/nvcc"
    if on_path or os.path.exists(usual):
        return _toolkit(on_path or usual)
    raise BuildError(
        "GPU operations need CUDA's compiler, and nvcc is not on PATH: install the CUDA toolkit of the framework's "
        "CUDA version and set HOROVOD_CUDA_HOME to its folder, or build without GPU operations"
    )


def _toolkit(nvcc: str) -> Cuda:
    """Return the toolkit of ``nvcc``, which may be a link or a script."""
    release = re.search(r"release (\d+\.\d+)", output_of([nvcc, "--version"]))
    if release is None:
        raise BuildError(
            f"{nvcc} does not tell its version: is it CUDA's compiler? Set HOROVOD_CUDA_HOME to CUDA's folder"
        )
    top = re.search(r"^#\$ TOP=(.+)$", output_of([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]), re.M)
    home = Path(top[1].strip()) if top else Path(nvcc).resolve().parent.parent
    return Cuda(home.resolve(), nvcc, release[1])


def check_frameworks(target: Target, frameworks: tuple[str, ...], cuda: Cuda) -> None:
    """Check that every framework was built for the toolkit's CUDA.

    Raises:
        BuildError: one was built without CUDA, or for another major version.
    """
    for name in frameworks:
        code = _TORCH_CUDA if name == "torch" else _TENSORFLOW_CUDA
        done = target.code(code, dict(target.environment(), TF_CPP_MIN_LOG_LEVEL="3"))
        if done.returncode:
            raise BuildError(f"{name} does not import: {done.stderr.strip().splitlines()[-1]}")
        version, built_for = done.stdout.split()[-2:]
        check_version(name, version, built_for, cuda)


def check_version(framework: str, version: str, built_for: str, cuda: Cuda) -> None:
    """Check one framework's CUDA version (``None``: built without CUDA) against the toolkit's.

    Raises:
        BuildError: they don't match.
    """
    if built_for == "None":
        raise BuildError(
            f"GPU operations: {framework} {version} was built without CUDA: install a {framework} built for CUDA "
            f"{cuda.version}, for which {cuda.nvcc} compiles, or build without GPU operations"
        )
    if built_for.split(".")[0] != cuda.version.split(".")[0]:
        raise BuildError(
            f"GPU operations: {framework} {version} was built for CUDA {built_for}, {cuda.nvcc} is CUDA "
            f"{cuda.version}: set HOROVOD_CUDA_HOME to a CUDA {built_for} toolkit, install a {framework} built for "
            f"CUDA {cuda.version}, or leave it out of the build (--frameworks)"
        )


def nccl(target: Target, cuda: Cuda, folder: Path, env: Mapping[str, str] = os.environ) -> Nccl:
    """Return the NCCL to build against; links to that of a Python package are made in ``folder``.

    HOROVOD_NCCL_HOME comes first, then the system's or the toolkit's NCCL, then torch's dependency from PyPI.

    Raises:
        BuildError: there is none.
    """
    for variable in ("HOROVOD_NCCL_HOME", "HOROVOD_NCCL_INCLUDE"):
        if env.get(variable):
            return Nccl(None, _absolute(env), f"{variable} ({env[variable]})")
    for home in (Path("/usr"), cuda.home):
        if (home / "include" / "nccl.h").is_file() and _library(home):
            rpath = () if home == Path("/usr") else (str(_library(home).parent),)  # type: ignore[union-attr]
            return Nccl(home, rpath, f"the system's ({home})")
    for site in (target.site, *map(Path, target.search)):
        package = site / "nvidia" / "nccl"
        if (package / "include" / "nccl.h").is_file():
            own = site == target.site
            rpath = ("$ORIGIN/../../nvidia/nccl/lib" if own else str(package / "lib"),)
            return Nccl(_linked(package, folder), rpath, f"that of torch's dependency ({package})")
    raise BuildError(
        f"GPU operations: NCCL's header and library are neither in the system's folders nor in {target.site}: install "
        "a torch with CUDA from PyPI, which brings them, or set HOROVOD_NCCL_HOME to the folder with include and lib"
    )


def _absolute(env: Mapping[str, str]) -> tuple[str, ...]:
    """Return the user's library folder as rpath, unless the loader finds it anyway."""
    folder = env.get("HOROVOD_NCCL_LIB") or (env.get("HOROVOD_NCCL_HOME", "") + "/lib")
    return (folder,) if os.path.isabs(folder) and Path(folder).is_dir() and not folder.startswith("/usr/lib") else ()


def _library(home: Path) -> Path | None:
    """Return NCCL's library below ``home``, or None."""
    folders = ("lib", "lib64", f"lib/{os.uname().machine}-linux-gnu")
    return next((p for p in (home / name / "libnccl.so" for name in folders) if p.exists()), None)


def _linked(package: Path, folder: Path) -> Path:
    """Make links with the names that CMake looks for in ``folder``: the package has only ``libnccl.so.2``."""
    home = folder / "nccl"
    (home / "lib").mkdir(parents=True)
    (home / "include").symlink_to(package / "include")
    library = next((package / "lib").glob("libnccl.so*"))
    for name in ("libnccl.so", "libnccl.so.2"):
        (home / "lib" / name).symlink_to(library)
    return home


def architectures(cuda: Cuda, env: Mapping[str, str] = os.environ) -> str:
    """Return the value of HOROVOD_BUILD_CUDA_CC_LIST: the user's, or the architectures that this nvcc supports.

    Raises:
        BuildError: nvcc supports none of them.
    """
    if env.get("HOROVOD_BUILD_CUDA_CC_LIST"):
        return env["HOROVOD_BUILD_CUDA_CC_LIST"]
    supported = {int(number) for number in re.findall(r"^sm_(\d+)$", output_of([cuda.nvcc, "--list-gpu-code"]), re.M)}
    codes = [number for number in ARCHITECTURES if number in supported]
    if not codes:
        raise BuildError(
            f"{cuda.nvcc} (CUDA {cuda.version}) lists none of the GPU architectures {ARCHITECTURES[0]} to "
            f"{ARCHITECTURES[-1]}: set HOROVOD_BUILD_CUDA_CC_LIST, for example to 80,90"
        )
    return ",".join(map(str, codes))


def environment(
    env: Mapping[str, str], operations: str, cuda: Cuda, library: Nccl | None, codes: str
) -> dict[str, str]:
    """Return ``env`` with the variables that Horovod's build reads about GPUs."""
    changed = dict(
        env,
        HOROVOD_GPU_OPERATIONS=operations,
        HOROVOD_CUDA_HOME=str(cuda.home),
        CUDA_HOME=str(cuda.home),
        HOROVOD_BUILD_CUDA_CC_LIST=codes,
        # Horovod's script and PyTorch use the first nvcc on PATH.
        PATH=f"{cuda.home / 'bin'}{os.pathsep}{env['PATH']}",
    )
    if library is not None and library.home is not None:
        changed["HOROVOD_NCCL_HOME"] = str(library.home)
    if library is not None:
        changed.setdefault("HOROVOD_NCCL_LINK", "SHARED")
    return changed
