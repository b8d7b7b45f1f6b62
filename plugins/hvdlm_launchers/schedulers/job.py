"""Description of a cluster job, the same for every scheduler."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from hvdlm.errors import HvdlmError
from hvdlm.io.untrusted_input import shown

# What goes into a job file as a word of its own, in a directive or a command. The shell and the schedulers, each with
# its own rules of quoting, read these words: all characters that any of them could take for more are refused.
_NAME = "one word of letters, digits and . , _ + @ : -"
_WORDS = {
    "queue": (r"[\w@][\w.,+@:-]*", _NAME),
    "account": (r"[\w@][\w.,+@:/-]*", f"{_NAME} /"),
    "mpi": (r"\w[\w.,+-]*", _NAME),
    "log": (r"[\w./%~][\w./%+@:,=~^-]*", "a path without blanks, quotes and other characters of the shell"),
    "image": (r"[\w./][\w./:@%+~=-]*", "a file or an address without blanks, quotes and other characters of the shell"),
}


@dataclass
class Job:
    """A cluster job.

    Args:
        scheduler: slurm, pbs, lsf, kubernetes, or one provided by a plugin
        nodes: number of nodes (Kubernetes: worker pods)
        ranks_per_node: number of ranks per node
        gpus_per_node: number of GPUs per node
        cpus_per_rank: number of cores per rank, and of framework threads
        memory_per_node: memory per node (GiB); null: the scheduler's default
        time: time limit of one job, [days-]hours:minutes:seconds; null: the queue's limit (PBS requires a value);
            Kubernetes: limit over all restarts
        save_seconds: seconds before the time limit at which the run saves and stops
        requeue: requeue the job after it saved and stopped, and after node failures
        supervise: restart a failed run within the job; needs hvdlm outside the image
        queue: queue; Slurm: partition; Kubernetes: a local queue of Kueue
        account: account or project to charge
        name: job name
        log: output file of the job; null: NAME-NUMBER.out, in the scheduler's syntax
        image: container image; Kubernetes: image name; otherwise a file or an address (docker://...) for Apptainer
        volumes: folders to mount in the container, [/scratch:/data]; Kubernetes: volume claims, [claim:/data], the
            first of which is the working directory
        setup: shell lines to run before the ranks start, for example [module load openmpi, source .venv/bin/activate]
        directives: additional scheduler directives, without #SBATCH, #PBS or #BSUB, for example [--exclusive]
        mpi: PMI type for srun --mpi (Slurm)
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
        """Number of ranks on all nodes."""
        return self.nodes * self.ranks_per_node

    @property
    def cpus_per_node(self) -> int:
        """Number of cores used on each node."""
        return self.ranks_per_node * self.cpus_per_rank

    @property
    def seconds(self) -> int | None:
        """``time`` in seconds.

        Raises:
            HvdlmError: it has another form than [days-]hours:minutes:seconds.
        """
        if self.time is None:
            return None
        match = re.fullmatch(r"(?:(\d{1,3})-)?(\d{1,4}):([0-5]\d):([0-5]\d)", self.time)
        if match is None:
            raise HvdlmError(
                f"--time: got {self.time!r}, expected [days-]hours:minutes:seconds, for example 24:00:00 or 2-12:00:00."
            )
        days, hours, minutes, seconds = (int(digits or 0) for digits in match.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds

    @property
    def mounts(self) -> list[tuple[str, str]]:
        """``volumes`` as pairs (folder or claim, mount point in the container).

        Raises:
            HvdlmError: one isn't of the form SOURCE:/FOLDER.
        """
        for volume in self.volumes:
            if not volume.isprintable() or not re.fullmatch(r"[^-:\s,][^:\s,]*:/[^:\s,]*", volume):
                raise HvdlmError(
                    f"--volumes: got {volume!r}, expected SOURCE:/FOLDER, for example [/scratch/me:/data]."
                )
        return [(source, target) for source, _, target in (volume.partition(":") for volume in self.volumes)]


def clock(seconds: int) -> str:
    """Return ``seconds`` as hours:minutes:seconds."""
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def check(job: Job) -> None:
    """Check everything about a job that doesn't depend on its scheduler.

    Raises:
        HvdlmError: the first mistake.
    """
    for name, minimum in (("nodes", 1), ("ranks_per_node", 1), ("cpus_per_rank", 1), ("gpus_per_node", 0)):
        if getattr(job, name) < minimum:
            raise HvdlmError(f"--{name}: got {getattr(job, name)}, expected {minimum} or more.")
    if job.memory_per_node is not None and job.memory_per_node < 1:
        raise HvdlmError(f"--memory_per_node: got {job.memory_per_node}, expected 1 (GiB) or more.")
    _check_time(job)
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]{0,62}", job.name):
        raise HvdlmError(f"--name: got {job.name!r}, expected a letter, then letters, digits, '.', '_' or '-'.")
    for name, (pattern, expected) in _WORDS.items():
        value = getattr(job, name)
        if value is not None and not re.fullmatch(pattern, value):
            raise HvdlmError(f"--{name}: got {shown(repr(value))}, expected {expected}.")
    for name in ("setup", "directives"):
        for line in getattr(job, name):
            if not line.isprintable() or not line.strip():
                raise HvdlmError(
                    f"--{name}: got {shown(repr(line))}, expected a list of single lines, for example [a, b]."
                )
    if job.mounts and job.image is None:
        raise HvdlmError("--volumes: there is no container to mount them in: name its --image.")


def _check_time(job: Job) -> None:
    seconds = job.seconds
    if job.save_seconds < 1:
        raise HvdlmError(f"--save_seconds: got {job.save_seconds}, expected 1 or more.")
    if seconds is not None and seconds <= job.save_seconds:
        raise HvdlmError(
            f"--time: {job.time} is not longer than the {job.save_seconds} s reserved for saving: give more time, or "
            "lower --save_seconds."
        )
