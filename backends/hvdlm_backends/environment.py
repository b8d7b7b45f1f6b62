"""What launchers tell in the environment, and what has to stand there before MPI, Horovod or a framework is loaded."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hvdlm.config import CommunicationConfig, Config
from hvdlm.diagnostics.probes import SPIN_COUNT, THREADS, WAITING, cores
from hvdlm.errors import HvdlmError

# Most specific first: Slurm's variables are also there inside an mpirun that runs in a Slurm allocation.
_LAUNCHERS = {
    "horovodrun (Gloo)": ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"),
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "MPICH or Intel MPI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
}
# What the processes that start ranks are called. All but horovodrun, whose ranks over Gloo share its cores, may bind a
# rank to some of the cores that they have themselves.
_STARTERS = ("horovodrun", "orte", "mpirun", "mpiexec", "prte", "hydra_", "slurmstepd")


class Launch(NamedTuple):
    """Who started this process, and which of how many it is."""

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int


def detect(environ: Mapping[str, str] = os.environ) -> Launch | None:
    """Return what the launcher's environment tells, or None where no launcher started this process."""
    for launcher, names in _LAUNCHERS.items():
        rank, size, local_rank, local_size = names
        if rank in environ and size in environ:
            total, place = _number(environ, size), _number(environ, rank)
            local = _number(environ, local_rank) if local_rank in environ else place
            return Launch(
                launcher, place, total, local, _number(environ, local_size) if local_size in environ else total
            )
    return None


def _number(environ: Mapping[str, str], name: str) -> int:
    first = environ[name].split("(")[0].split(",")[0]  # Slurm writes 4(x2),3
    if not first.isdigit():
        raise HvdlmError(
            f"the environment variable {name} is {environ[name]!r}, expected a whole number as launchers set it: unset "
            "it, or start with horovodrun, mpirun or srun."
        )
    return int(first)


def prepare(launch: Launch | None, config: Config) -> int:
    """Set thread counts and Horovod's and MPI's settings for this rank; return the framework threads per rank.

    What the user has set in the environment stands, unless the configuration says otherwise.
    Must run before numpy's BLAS, a framework or MPI is loaded: they read these once.
    """
    local_size = launch.local_size if launch else 1
    node = launcher_cores()
    # A rank that its launcher has bound to its own cores (srun --cpus-per-task) shares them with nobody.
    threads = config.train.threads or max(1, min(cores(), node // local_size))
    if config.parallel.pipeline > 1:
        # TensorFlow starts messages between stages in a thread of its operations: were the only one computing, they
        # would wait for the end of a backward pass (2 stages, width 512: idle for 0.16 of a step instead of 0.12).
        os.environ.setdefault("TF_NUM_INTEROP_THREADS", str(threads + 1))
    for name in THREADS:
        os.environ.setdefault(name, str(threads))
    if not any(name in os.environ for name in WAITING):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
    if local_size > 1 and local_size * threads >= node:
        # No core is idle, so whoever waits must give its core to one that computes: with 2 ranks on 2 cores, a step of
        # a small GPT took 77 ms instead of 109 ms with PyTorch, 85 ms instead of 137 ms with TensorFlow.
        os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    os.environ.update(horovod_settings(config.communication))
    timeout = config.communication.timeout
    os.environ.setdefault("HOROVOD_STALL_CHECK_TIME_SECONDS", str(max(1, round(timeout / 2))))
    # Later than hvdlm.diagnostics.watchdog, which knows more to say.
    os.environ.setdefault("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", str(max(2, round(2 * timeout + 15))))
    return threads


def launcher_cores() -> int:
    """Return how many cores the launcher has for its ranks on this node; where none is found, those of this process."""
    own, process = cores(), os.getppid()
    try:
        while process > 1 and not Path(f"/proc/{process}/comm").read_text().startswith(_STARTERS):
            process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        return max(own, len(os.sched_getaffinity(process))) if process > 1 else own
    except (OSError, ValueError, AttributeError):
        return own


def horovod_settings(options: CommunicationConfig) -> dict[str, str]:
    """Return the environment variables by which Horovod 0.28 is told what ``communication`` asks for."""
    wanted: dict[str, Any] = {
        "HOROVOD_FUSION_THRESHOLD": options.fusion_bytes,
        "HOROVOD_CYCLE_TIME": options.cycle_ms,
        "HOROVOD_CACHE_CAPACITY": options.cache_capacity,
        "HOROVOD_HIERARCHICAL_ALLREDUCE": options.hierarchical_all_reduce,
        "HOROVOD_HIERARCHICAL_ALLGATHER": options.hierarchical_all_gather,
        "HOROVOD_AUTOTUNE": options.autotune or None,
        "HOROVOD_AUTOTUNE_LOG": options.autotune_log,
        "HOROVOD_THREAD_AFFINITY": options.thread_affinity,
        "HOROVOD_TIMELINE": options.timeline,
        "HOROVOD_STALL_CHECK_TIME_SECONDS": None if options.stall_check is None else max(1, round(options.stall_check)),
    }
    return {k: str(int(v) if isinstance(v, bool) else v) for k, v in wanted.items() if v is not None}


def check_host_name() -> None:
    """Refuse to start Gloo where this machine's name has no address: the released Horovod binds its ranks to that.

    Raises:
        HvdlmError: every rank would abort.
    """
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError as error:
        raise HvdlmError(
            f"this machine's name {name} has no address ({error}), and Gloo of this Horovod needs one: add "
            f'"127.0.0.1 {name}" to /etc/hosts, use mpirun, or build Horovod with python -m hvdlm horovod build.'
        ) from error


def check_alone(launch: Launch | None) -> None:
    """Refuse to run alone where a launcher started several ranks.

    Raises:
        HvdlmError: the run would silently become several runs of one rank each.
    """
    if launch and launch.size > 1:
        raise HvdlmError(
            f"backend local runs one process, but {launch.launcher} started {launch.size}: "
            "use --backend auto, or start python -m hvdlm without a launcher."
        )
