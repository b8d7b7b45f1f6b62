"""Sets the environment variables that MPI, Horovod and frameworks read when they are loaded: threads and settings."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hvdlm.config import CommunicationConfig, Config
from hvdlm.diagnostics import failure_files
from hvdlm.diagnostics.phases import READING, STARTUP_SECONDS, process
from hvdlm.errors import HvdlmError
from hvdlm.io import launcher_env
from hvdlm.io.launcher_env import Launch
from hvdlm.io.machine import cores
from hvdlm.io.untrusted_input import shown
from hvdlm_backends import ring_sum
from hvdlm_backends.probes import SPIN_COUNT, THREADS, WAITING

# Names of processes that start ranks. All but horovodrun, whose Gloo ranks share its cores, may bind a rank to a subset
# of their own cores.
_LAUNCHER_PROCESSES = ("horovodrun", "orte", "mpirun", "mpiexec", "prte", "hydra_", "slurmstepd")
# How long a name may take to be resolved: as long as the C library asks three name servers, twice each.
_NAME_SERVER_SECONDS = 30.0
_set_by_options: set[str] = set()  # names of the environment variables that ``prepare`` set last


def prepare(launch: Launch | None, config: Config) -> int:
    """Set thread counts and the settings of Horovod and MPI for this rank; return the framework's threads per rank.

    Variables that the user has set are kept unless the configuration sets the same. Call this before numpy's BLAS, a
    framework or MPI is loaded: they read the variables once.
    """
    threads = set_threads(launch, config)
    if launch and launch.local_size == launch.size:
        # Ranks of one host need no libfabric, whose module in Open MPI sleeps a second when a rank ends.
        if os.environ.get("OMPI_MCA_btl", "^openib") == "^openib":  # which horovodrun always sets
            os.environ["OMPI_MCA_btl"] = "^ofi,openib"
    settings = horovod_settings(config.communication)
    for name in _set_by_options - settings.keys():  # by an earlier run of this process
        os.environ.pop(name, None)
    os.environ.update(settings)
    _set_by_options.clear()
    _set_by_options.update(settings)
    timeout = config.communication.timeout
    os.environ.setdefault("HOROVOD_STALL_CHECK_TIME_SECONDS", str(max(1, round(timeout / 2))))
    os.environ.setdefault("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", str(after_watchdog(timeout)))
    return threads


def set_threads(launch: Launch | None, config: Config) -> int:
    """Set thread counts in the environment for this rank; return the framework's threads per rank; see ``prepare``."""
    local_size = launch.local_size if launch else 1
    node = launcher_cores()
    # A rank that its launcher has bound to cores of its own (srun --cpus-per-task) uses all of these.
    threads = config.train.threads or max(1, min(cores(), node // local_size))
    if config.communication.reduction == "exact":  # products add in an order that depends on the threads
        threads = config.train.threads or 1
    if config.parallel.pipeline > 1 or config.parallel.tensor > 1:
        # TensorFlow starts messages between stages, and sums between tensor ranks, from an inter-op thread: with a
        # single one, they would wait until it has finished what it computes, a product or a whole backward pass (2
        # stages, width 512: idle for 0.16 of a step instead of 0.12).
        os.environ.setdefault("TF_NUM_INTEROP_THREADS", str(threads + 1))
    for name in THREADS:
        os.environ.setdefault(name, str(threads))
    if not any(name in os.environ for name in WAITING):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
    if local_size > 1 and local_size * threads >= node:
        # No core is idle, so a rank that waits must yield its core to one that computes: with 2 ranks on 2 cores, a
        # step of a small GPT took 77 ms instead of 109 ms with PyTorch, 85 ms instead of 137 ms with TensorFlow.
        os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    return threads


def refuse_horovod_settings(config: Config, backend: str) -> None:
    """Raise HvdlmError where ``config`` has settings of Horovod, which ``backend`` does not use."""
    options = config.communication
    for name, value in (("autotune", options.autotune), ("timeline", options.timeline)):
        if value:
            raise HvdlmError(
                f"communication.{name} is a setting of Horovod, which backend {backend} doesn't use: leave it out, or "
                "use --backend mpi."
            )


def after_watchdog(timeout: float) -> int:
    """Return seconds for limits of the transport, by ``communication.timeout``.

    They end later than those of hvdlm's watchdog, whose diagnosis is more detailed, and which waits for ranks that
    compile.
    """
    return round((READING + 0.5) * timeout + STARTUP_SECONDS)


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
        ring_sum.VARIABLE: options.ring_bytes,
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


# May differ between ranks: what a launcher gives each of them, what belongs to a host, and the options of builds.
PER_RANK = re.compile(
    r"HOROVOD_((LOCAL_|CROSS_)?(RANK|SIZE)|HOSTNAME|GLOO_IFACE|GLOO_RENDEZVOUS_\w+|THREAD_AFFINITY|TIMELINE|AUTOTUNE_LOG"
    r"|LOG_\w+|WITH_\w+|WITHOUT_\w+|BUILD_\w+|\w+_(HOME|INCLUDE|LIB|LINK)|GPU_\w+|CUDA_\w+|ROCM_\w+)"
)


def shared_settings() -> bytes:
    """Return Horovod's environment variables that have to be equal on all ranks, as JSON."""
    names = [name for name in os.environ if name.startswith("HOROVOD_") and not PER_RANK.fullmatch(name)]
    return json.dumps({name: os.environ[name] for name in sorted(names)}).encode()


def compare(settings: Sequence[bytes]) -> None:
    """Compare the ranks' ``shared_settings``, in rank order.

    Raises:
        HvdlmError: a rank's differ from rank 0's, with which Horovod would hang or crash.
    """
    first, *others = (json.loads(text) for text in settings)
    for rank, other in enumerate(others, 1):
        compare_with_first(rank, other, first)


def compare_with_first(rank: int, own: Mapping[str, str], first: Mapping[str, str]) -> None:
    """Raise HvdlmError where the settings of ``rank`` differ from rank 0's."""
    for name in sorted({*own, *first}):
        if own.get(name) != first.get(name):
            values = [f"{other[name][:200]!r}" if name in other else "not set" for other in (own, first)]
            raise HvdlmError(
                f"{name} is {values[0]} on rank {rank} and {values[1]} on rank 0: Horovod hangs or crashes where ranks "
                "differ. Set it alike for all ranks, or unset it."
            )


def check_gloo_address(bound_by_name: bool) -> None:
    """Check that this rank finds the launcher, and has an address that Gloo can bind it to.

    Args:
        bound_by_name: whether this Horovod ignores the interface that ``horovodrun`` chooses, as the released one does.

    Raises:
        HvdlmError: one of them doesn't resolve or exist, so that Horovod would abort in native code.
    """
    interface = os.environ.get(launcher_env.GLOO_INTERFACE, "")
    if interface and interface not in (name for _, name in socket.if_nameindex()):
        known = ", ".join(name for _, name in socket.if_nameindex())
        raise HvdlmError(
            f"{launcher_env.GLOO_INTERFACE} is {interface!r}, but this machine's network interfaces are {known}: start "
            "with horovodrun --gloo --network-interfaces NAME."
        )
    server, port = launcher_env.gloo_rendezvous()
    if server and not (port.isascii() and port.isdigit() and int(port[:8]) < 1 << 16):
        raise HvdlmError(
            f"the environment variable {launcher_env.GLOO_PORT} is {shown(repr(port))}, expected a port as horovodrun "
            "--gloo sets it: start with horovodrun --gloo."
        )
    if server and (error := _unresolved(server)) is not None:
        raise HvdlmError(
            f"horovodrun's address {server} can't be resolved on this machine ({error}): add it to /etc/hosts, or use "
            "--network-interfaces NAME, or mpirun."
        )
    name = socket.gethostname()
    if (bound_by_name or not interface) and (error := _unresolved(name)) is not None:
        raise HvdlmError(
            f"this machine's name {name} has no address ({error}), and Gloo of this Horovod needs one: add "
            f'"127.0.0.1 {name}" to /etc/hosts, use mpirun, or build Horovod with python -m hvdlm horovod build.'
        )


def _unresolved(name: str) -> OSError | None:
    """Return why a host's name has no address; None: it has.

    A name server that doesn't answer would hold this rank for 10 s and more, while the others wait for it to connect.
    """
    limit = min(_NAME_SERVER_SECONDS, process.timeout / 2)  # before the others' watchdogs report this rank
    late = TimeoutError(f"no name server answered within {limit:g} s")
    failure: OSError | None = failure_files.within(limit, lambda: _lookup_error(name), late)
    return failure


def _lookup_error(name: str) -> OSError | None:
    try:
        socket.getaddrinfo(name, None)
    except OSError as error:
        return error
    return None


def launch_shape(backend: str) -> tuple[int, int, int, int]:
    """Return the launch shape; without a launcher, that of a single process.

    Raises:
        HvdlmError: the ranks are threads of one process, which ``backend`` can't connect.
    """
    launch = launcher_env.detect()
    if launch and launch.launcher == launcher_env.THREADS:
        raise HvdlmError(
            f"--ranks starts threads of one process, which backend {backend} can't connect: use --backend threads, or "
            f"start processes (python -m hvdlm run -np {launch.size}) without --ranks."
        )
    return launcher_env.launch_shape()


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
