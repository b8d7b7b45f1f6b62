"""What a job needs of a cluster, whichever scheduler it goes to."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from hvdlm.errors import HvdlmError


@dataclass
class Job:
    """A job.

    Args:
        scheduler: slurm, pbs, lsf, kubernetes, or one that a plugin brings
        nodes: machines (Kubernetes: worker pods)
        ranks_per_node: ranks on each of them
        gpus_per_node: GPUs of each of them
        cpus_per_rank: cores of a rank, and its threads
        memory_per_node: memory of each node (GiB); None: what the scheduler gives
        time: longest time between two stays in the queue, [days-]hours:minutes:seconds; None: the queue's own limit
            (PBS has to be told); Kubernetes: the longest time in all
        save_seconds: so many seconds before its time is over the run is told to save
        requeue: goes back into the queue where it has saved, and where a node failed
        supervise: a run that fails is started again within the job; needs hvdlm where the job script runs
        queue: queue; Slurm: partition; Kubernetes: a local queue of Kueue
        account: account or project that is charged
        name: the job's name
        log: file of what the job prints; None: NAME-NUMBER.out, as each scheduler writes it
        image: Kubernetes: the image; elsewhere a file for Apptainer, or an address that it takes (docker://...)
        volumes: folders that the container sees, [/scratch:/data]; Kubernetes: claims, [claim:/data]; relative paths
            begin in the first
        setup: lines of shell before the run, for example [module load openmpi, source .venv/bin/activate]
        directives: more lines for the scheduler, without #SBATCH, #PBS or #BSUB, for example [--exclusive]
        mpi: which kind of PMI srun offers (Slurm)
    """

    scheduler: str = ""
    nodes: int = 1
    ranks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_rank: int = 1
    memory_per_node: int | None = None
    time: str | None = None
    save_seconds: int = 120
    requeue: bool = True
    supervise: bool = False
    queue: str | None = None
    account: str | None = None
    name: str = "hvdlm"
    log: str | None = None
    image: str | None = None
    volumes: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    directives: list[str] = field(default_factory=list)
    mpi: str = "pmix"

    @property
    def ranks(self) -> int:
        """Ranks on all nodes."""
        return self.nodes * self.ranks_per_node

    @property
    def cpus_per_node(self) -> int:
        """Cores of a node."""
        return self.ranks_per_node * self.cpus_per_rank

    @property
    def seconds(self) -> int | None:
        """``time`` in seconds.

        Raises:
            HvdlmError: it is no time.
        """
        if self.time is None:
            return None
        found = re.fullmatch(r"(?:(\d{1,3})-)?(\d{1,4}):([0-5]\d):([0-5]\d)", self.time)
        if found is None:
            raise HvdlmError(
                f"--time: got {self.time!r}, expected [days-]hours:minutes:seconds, for example 24:00:00 or 2-12:00:00."
            )
        days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds

    @property
    def mounts(self) -> list[tuple[str, str]]:
        """``volumes`` as (what, where in the container).

        Raises:
            HvdlmError: one isn't of the form WHAT:/FOLDER.
        """
        for volume in self.volumes:
            if not re.fullmatch(r"[^:\s,]+:/[^:\s,]*", volume):
                raise HvdlmError(f"--volumes: got {volume!r}, expected WHAT:/FOLDER, for example [/scratch/me:/data].")
        return [(what, where) for what, _, where in (volume.partition(":") for volume in self.volumes)]


def clock(seconds: int) -> str:
    """Return ``seconds`` as hours:minutes:seconds."""
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def check(job: Job) -> None:
    """Check what can be said of a job without its scheduler.

    Raises:
        HvdlmError: the first thing found wrong.
    """
    for name, least in (("nodes", 1), ("ranks_per_node", 1), ("cpus_per_rank", 1), ("gpus_per_node", 0)):
        if getattr(job, name) < least:
            raise HvdlmError(f"--{name}: got {getattr(job, name)}, expected {least} or more.")
    if job.memory_per_node is not None and job.memory_per_node < 1:
        raise HvdlmError(f"--memory_per_node: got {job.memory_per_node}, expected 1 (GiB) or more.")
    _check_time(job)
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]{0,62}", job.name):
        raise HvdlmError(f"--name: got {job.name!r}, expected a letter, then letters, digits, '.', '_' or '-'.")
    for name in ("queue", "account", "log", "image", "mpi"):
        value = getattr(job, name)
        if value is not None and not re.fullmatch(r"[^\s'\"]+", value):
            raise HvdlmError(f"--{name}: got {value!r}, expected one word without blanks and quotes.")
    for name in ("setup", "directives"):
        for line in getattr(job, name):
            if "\n" in line or not line.strip():
                raise HvdlmError(f"--{name}: got {line!r}, expected a list of single lines, for example [a, b].")
    if job.mounts and job.image is None:
        raise HvdlmError("--volumes: there is no container to see them: give its --image.")


def _check_time(job: Job) -> None:
    seconds = job.seconds
    if job.save_seconds < 1:
        raise HvdlmError(f"--save_seconds: got {job.save_seconds}, expected 1 or more.")
    if seconds is not None and seconds <= job.save_seconds:
        raise HvdlmError(
            f"--time: {job.time} leaves nothing before the {job.save_seconds} s in which the run saves: give more, or "
            "lower --save_seconds."
        )
