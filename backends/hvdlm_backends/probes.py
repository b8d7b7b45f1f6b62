"""Gathers facts about this machine's installation, for ``hvdlm_backends.doctor_command``.

Frameworks and transports are imported in separate processes, so that a broken one fails only its own probe.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hvdlm.io import launcher_env
from hvdlm.io.machine import cores
from hvdlm.io.user_folders import user_cache
from hvdlm.protocols.framework import Probe

Facts = dict[str, Any]

THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "TF_NUM_INTEROP_THREADS",
)
# How OpenMP threads wait for each other: GCC's library reads both, and the first one overrides the second.
WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
# The iterations of a few nanoseconds that a waiting thread spins before it sleeps, if the environment sets neither. The
# library's default, 300,000, takes the core from the thread that is waited for (docs/decisions/0009).
SPIN_COUNT = "1000"
BUILT = ("mpi_built", "gloo_built", "nccl_built")

# Every probe prints JSON objects, one a line: those printed before a crash are kept.
_PRELUDE = """
import json, os
def report(**facts): print(json.dumps(facts), flush=True)
def libmpi():
    paths = {line.split()[-1] for line in open('/proc/self/maps')} if os.path.exists('/proc/self/maps') else set()
    names = ('libmpi.so', 'libmpich.so')
    return sorted({os.path.realpath(path) for path in paths if os.path.basename(path).startswith(names)})
"""
_HOROVOD = """
import horovod.{name} as hvd
patched = hasattr(hvd.mpi_ops._basics.MPI_LIB_CTYPES, 'horovod_transfer_seconds')
report(libmpi=libmpi(), patched=patched, **{{name: bool(getattr(hvd, name)()) for name in {built}}})
hvd.init()
report(mpi_threads_supported=bool(hvd.mpi_threads_supported()) if hvd.mpi_built() else None)
hvd.shutdown()
"""
_MPI4PY = """
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
report(version=mpi4py.__version__, library=MPI.Get_library_version(), libmpi=libmpi())
"""


_HOST_NAME = """
import socket
report(name=socket.gethostname())
socket.getaddrinfo(socket.gethostname(), None)
"""


def unpinned() -> dict[str, str]:
    """Return this process's environment without thread counts, launchers' and Horovod's variables."""
    environ = launcher_env.without_transport(os.environ)
    return {name: value for name, value in environ.items() if name not in (*THREADS, *WAITING)}


def gather(frameworks: Mapping[str, Probe], timeout: float = 120.0) -> Facts:
    """Return the facts about this machine; probes run in parallel, each for at most ``timeout`` seconds."""
    horovod = {name: _HOROVOD.format(name=name, built=BUILT) if p.horovod else "" for name, p in frameworks.items()}
    codes = {name: f"\n{p.code}\n{horovod[name]}" for name, p in frameworks.items()}
    codes |= {"mpi4py": _MPI4PY, "host": _HOST_NAME}
    with ThreadPoolExecutor(len(codes)) as pool:
        probes = dict(zip(codes, pool.map(lambda code: probe(code, timeout), codes.values()), strict=True))
    cache = user_cache()
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    shown = ("HOROVOD_", "OMPI_ALLOW_RUN_AS_ROOT", "OMPI_MCA_mpi_yield_when_idle", *THREADS, *WAITING)
    return {
        **probes,
        "frameworks": frameworks,
        "installed": {name: _version(name) for name in ("hvdlm", "keras", "horovod")},
        "mpirun": _mpirun(),
        "cores": cores(),
        "quota": _quota(Path("/sys/fs/cgroup/cpu.max")),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(shown)},
        "root": hasattr(os, "geteuid") and os.geteuid() == 0,
        "home": os.path.expanduser("~") != "~",
        "remote_shell": next(
            (name for name in ("ssh", "rsh") if shutil.which(name, path=launcher_env.search_path())), ""
        ),
        "cache": str(cache),
        "free_bytes": shutil.disk_usage(existing).free,
    }


def probe(code: str, timeout: float) -> Facts:
    """Return the facts that ``code`` reports in a process of its own; ``error``: the last line of its exception."""
    facts: Facts = {}
    try:
        command = [sys.executable, "-c", _PRELUDE + code]
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
    """Run ``command`` without the variables of a launcher that started this process."""
    env = {**launcher_env.for_launchers(), "TF_CPP_MIN_LOG_LEVEL": "3"}
    return subprocess.run(command, env=env, capture_output=True, text=True, errors="replace", timeout=timeout)


def _cause(errors: list[str]) -> str:
    """Return the line of the exception, or the last line after a crash without one."""
    exceptions = [line for line in errors if re.match(r"[\w.]*(Error|Exception|Exit)\b", line)]
    return (exceptions or errors or [""])[-1][:300]


def _mpirun() -> Facts:
    mpirun = shutil.which("mpirun", path=launcher_env.search_path())
    if mpirun is None:
        return {}
    facts: Facts = {"path": mpirun, "version": ""}
    try:
        facts["version"] = (_run([mpirun, "--version"], 30).stdout.strip().splitlines() or [""])[0]
        done = _run([mpirun, "-n", "1", sys.executable, "-c", ""], 30)
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
    """Return the number of cores whose time a container may use, or None without a limit."""
    try:
        quota, period = path.read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None
