"""The shell that jobs share: it starts the ranks, tells them when time is nearly over, and waits for them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import PurePosixPath

from hvdlm_launchers.schedulers.job import Job

from hvdlm.config import Config

_WAIT = """\
# The signal may come at any moment: to ranks that run, or just before they do.
step="" told=no
tell() {{
    told=yes
    [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null
}}
trap tell {signals}

{command} &
step=$!
[ "$told" = no ] || tell
while wait "$step"; code=$?; [ "$told" = yes ]; do
    told=no # the signal ended the wait, not the run
done
"""


def script(title: str, prefix: str, directives: Sequence[str], job: Job, body: str) -> str:
    """Return a job script: ``title``, the scheduler's lines (each behind ``prefix``), then ``body``."""
    lines = ["#!/usr/bin/env bash", f"# {title}", *(f"{prefix} {line}" for line in (*directives, *job.directives))]
    return "\n".join(lines) + f"\n\nset -uo pipefail\n{body}"


def wait(job: Job, command: str, signals: str) -> str:
    """Return the part that runs ``command``, hands ``signals`` on to it as SIGUSR1, and sets ``code``."""
    setup = "".join(f"{line}\n" for line in job.setup)
    return f"{setup}export OMP_NUM_THREADS={job.cpus_per_rank}\n" + _WAIT.format(command=command, signals=signals)


def again(condition: str, command: str) -> str:
    """Return the end of a script that has itself queued again by ``command`` where the run has saved."""
    return f"""
if {condition}; then
    echo "hvdlm: stopped and saved, back into the queue" >&2
    {command} || echo "hvdlm: that failed: submit the job again, it goes on from there" >&2
fi
"""


def mpirun(job: Job, hosts: str) -> str:
    """Return the command that starts a rank in each slot of the file ``hosts`` ("" where Open MPI knows by itself).

    An absolute path makes Open MPI look for its own files on other hosts where it lies here.
    """
    file = f' --hostfile "{hosts}"' if hosts else ""
    return (
        f'"$(command -v mpirun)" -np {job.ranks}{file} --bind-to none \\\n'
        "    -x PATH -x OMP_NUM_THREADS ${LD_LIBRARY_PATH:+-x LD_LIBRARY_PATH}"
    )


def agent(program: str) -> str:
    """Return the lines by which Open MPI 4 and 5 reach other hosts through ``program`` where they would take ssh.

    By its whole path: on the other hosts they look for it too.
    """
    return (
        f"if agent=$(command -v {program}); then\n"
        '    export OMPI_MCA_plm_rsh_agent="$agent" PRTE_MCA_plm_ssh_agent="$agent"\nfi\n'
    )


def train(job: Job, arguments: Sequence[str], config: Config, launcher: str, more: str = "") -> str:
    """Return the command that trains on all ranks; ``more``: shell after the options, such as ``"$@"``.

    Where the user said from which checkpoint to go on, that counts until the run's folder holds one.
    """
    supervisor = "python -m hvdlm supervise -- " if job.supervise else ""
    words = ["python", "-m", "hvdlm", "--train.threads", str(job.cpus_per_rank), *arguments]
    resume = "auto"
    if config.checkpoint.resume not in ("none", "auto"):
        kept = shlex.quote(f"{_outside(job, config.log.run)}/checkpoints/latest")
        start = shlex.quote(config.checkpoint.resume)
        resume = f'"$([ -e {kept} ] && echo auto || echo {start})"'
    return f"{supervisor}{launcher} \\\n    {_container(job)}{shlex.join(words)}{more} --checkpoint.resume {resume}"


def _outside(job: Job, folder: str) -> str:
    """Return where the job script sees a folder of Apptainer's container."""
    for what, where in job.mounts if job.scheduler != "kubernetes" else []:
        if PurePosixPath(folder).is_relative_to(where):
            return str(PurePosixPath(what) / PurePosixPath(folder).relative_to(where))
    return folder


def _container(job: Job) -> str:
    """Return what runs a command in the image; on Kubernetes all is in it anyway."""
    if job.image is None or job.scheduler == "kubernetes":
        return ""
    binds = [word for what, where in job.mounts for word in ("--bind", f"{what}:{where}")]
    gpus = ["--nv"] if job.gpus_per_node else []
    return shlex.join(["apptainer", "exec", *gpus, *binds, job.image]) + " \\\n    "
