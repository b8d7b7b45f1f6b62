"""Sets the environment variables that MPI, Horovod and frameworks read when they are loaded: threads and settings."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

from hvdlm.config import CommunicationConfig, Config
from hvdlm.diagnostics.probes import SPIN_COUNT, THREADS, WAITING, cores
from hvdlm.errors import HvdlmError
from hvdlm.io.launcher_env import Launch

# Names of processes that start ranks. All but horovodrun, whose Gloo ranks share its cores, may bind a rank to a subset
# of their own cores.
_LAUNCHER_PROCESSES = ("horovodrun", "orte", "mpirun", "mpiexec", "prte", "hydra_", "slurmstepd")


def prepare(launch: Launch | None, config: Config) -> int:
    """Set thread counts and the settings of Horovod and MPI for this rank; return the framework's threads per rank.

    Variables that the user has set are kept unless the configuration sets the same. Call this before numpy's BLAS, a
    framework or MPI is loaded: they read the variables once.
    """
    local_size = launch.local_size if launch else 1
    node = launcher_cores()
    # A rank that its launcher has bound to cores of its own (srun --cpus-per-task) uses all of these.
    threads = config.train.threads or max(1, min(cores(), node // local_size))
    if config.parallel.pipeline > 1:
        # TensorFlow starts messages between stages from an inter-op thread: with a single one, they would wait until it
        # has finished a backward pass (2 stages, width 512: idle for 0.16 of a step instead of 0.12).
        os.environ.setdefault("TF_NUM_INTEROP_THREADS", str(threads + 1))
    for name in THREADS:
        os.environ.setdefault(name, str(threads))
    if not any(name in os.environ for name in WAITING):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
    if local_size > 1 and local_size * threads >= node:
        # No core is idle, so a rank that waits must yield its core to one that computes: with 2 ranks on 2 cores, a
        # step of a small GPT took 77 ms instead of 109 ms with PyTorch, 85 ms instead of 137 ms with TensorFlow.
        os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    os.environ.update(horovod_settings(config.communication))
    timeout = config.communication.timeout
    os.environ.setdefault("HOROVOD_STALL_CHECK_TIME_SECONDS", str(max(1, round(timeout / 2))))
    # Later than the watchdog of hvdlm, whose diagnosis is more detailed.
    os.environ.setdefault("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", str(max(2, round(2 * timeout + 15))))
    return threads


def launcher_cores() -> int:
    """Return the number of cores that the launcher has on this node, or without a launcher those of this process."""
    process_cores, process = cores(), os.getppid()
    try:
        while process > 1 and not Path(f"/proc/{process}/comm").read_text().startswith(_LAUNCHER_PROCESSES):
            process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        return max(process_cores, len(os.sched_getaffinity(process))) if process > 1 else process_cores
    except (OSError, ValueError, AttributeError):
        return process_cores


def horovod_settings(options: CommunicationConfig) -> dict[str, str]:
    """Return the environment variables of Horovod 0.28 for the options in ``communication``."""
    settings: dict[str, Any] = {
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
    return {k: str(int(v) if isinstance(v, bool) else v) for k, v in settings.items() if v is not None}


def check_host_name() -> None:
    """Check that this machine's name has an address, to which the Gloo of the released Horovod binds its ranks.

    Raises:
        HvdlmError: it has none, so that every rank would abort.
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
    """Check that this is the only process.

    Raises:
        HvdlmError: a launcher started several ranks, each of which would silently train on its own.
    """
    if launch and launch.size > 1:
        raise HvdlmError(
            f"backend local runs one process, but {launch.launcher} started {launch.size}: "
            "use --backend auto, or start python -m hvdlm without a launcher."
        )
