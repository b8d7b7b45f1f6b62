"""Shell code that job scripts share: start the ranks, signal them before the time limit, and wait for them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from hvdlm.checkpoints.discovery import newest_step
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm_launchers.schedulers.job import Job

_WAIT = """\
# The signal may arrive at any moment, even before the ranks run.
launcher="" signalled=no
request_save() {{
    signalled=yes
    [ -z "$launcher" ] || kill -USR1 "$launcher" 2>/dev/null
}}
trap request_save {signals}

{command} &
launcher=$!
[ "$signalled" = no ] || request_save
while wait "$launcher"; code=$?; [ "$signalled" = yes ]; do
    signalled=no # the signal ended the wait, not the run
done
"""


def script(title: str, prefix: str, directives: Sequence[str], job: Job, body: str) -> str:
    """Return a job script: ``title`` as a comment, ``directives`` (each after ``prefix``), and ``body``."""
    lines = ["#!/usr/bin/env bash", f"# {title}", *(f"{prefix} {line}" for line in (*directives, *job.directives))]
    return "\n".join(lines) + f"\n\n{body}"


def wait(job: Job, command: str, signals: str) -> str:
    """Return shell code that runs ``command``, forwards ``signals`` to it as SIGUSR1, and sets ``code``.

    The site's own lines come before ``set -u``: modules and activation scripts use variables that are not set.
    """
    setup = "".join(f"{line}\n" for line in job.setup)
    own = f"set -uo pipefail\nexport OMP_NUM_THREADS={job.cpus_per_rank}\n"
    return setup + own + _WAIT.format(command=command, signals=signals)


def requeue(condition: str, command: str) -> str:
    """Return shell code that runs ``command``, which queues the job again, if ``condition`` holds."""
    return f"""
if {condition}; then
    echo "hvdlm: stopped and saved, returning to the queue" >&2
    {command} || echo "hvdlm: could not return to the queue: submit the job again, and the run resumes" >&2
fi
"""


def quote(word: str) -> str:
    """Return ``word`` for bash, on one line: LSF reads directives from every line of a script, even within quotes."""
    if word.isprintable():
        return shlex.quote(word)
    escaped = (f"\\{c}" if c in "\\'" else c if c.isprintable() else _escape(c) for c in word)
    return f"$'{''.join(escaped)}'"


def _escape(character: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape"))


def mpirun(job: Job, hosts: str) -> str:
    """Return the command that starts a rank in each slot of the file ``hosts`` ("": Open MPI finds the hosts itself).

    The absolute path makes Open MPI look for its own files on other hosts under the same prefix as here.
    """
    file = f' --hostfile "{hosts}"' if hosts else ""
    return (
        f'"$(command -v mpirun)" -np {job.ranks}{file} --bind-to none \\\n'
        "    -x PATH -x OMP_NUM_THREADS ${LD_LIBRARY_PATH:+-x LD_LIBRARY_PATH}"
    )


def agent(program: str) -> str:
    """Return shell code that has Open MPI 4 and 5 start their daemons with ``program`` in place of ssh.

    They get its absolute path, since they run it on the other hosts, too.
    """
    return (
        f"if agent=$(command -v {program}); then\n"
        '    export OMPI_MCA_plm_rsh_agent="$agent" PRTE_MCA_plm_ssh_agent="$agent"\nfi\n'
    )


def train(job: Job, arguments: Sequence[str], config: Config, launcher: str, more: str = "") -> str:
    """Return the command that trains on all ranks; ``more``: shell code after the options, such as ``"$@"``.

    A checkpoint that the user names to resume from counts only until the job has saved one of its own.
    """
    supervisor = "python -m hvdlm supervise -- " if job.supervise else ""
    words = ["python", "-m", "hvdlm", "--train.threads", str(job.cpus_per_rank), *arguments]
    resume = "auto"
    if config.checkpoint.resume not in ("none", "auto"):
        resume = f'"$({_has_saved(job, config)} && echo auto || printf %s {quote(config.checkpoint.resume)})"'
    command = " ".join(map(quote, words))
    return f"{supervisor}{launcher} \\\n    {_container(job)}{command}{more} --checkpoint.resume {resume}"


def _has_saved(job: Job, config: Config) -> str:
    """Return a shell command that succeeds if the run holds a checkpoint that was written after this script."""
    run = _host_path(job, config.log.run)
    folder, before = quote(f"{run}/checkpoints"), newest_step(Path(run))
    if before is None or job.scheduler == "kubernetes":
        return f"[ -e {folder}/latest ]"
    number = f"""sed -n 's/^ "sequence": \\([0-9]*\\),*$/\\1/p' {folder}/"$(cat {folder}/latest)"/manifest.json"""
    return f'{{ [ "$({number})" -gt {before[1]} ]; }} 2>/dev/null'


def check_resume(job: Job, config: Config) -> None:
    """Check that the job's script can tell whether the job has saved since it was resumed.

    Raises:
        HvdlmError: it is to resume from a checkpoint in the run's own folder, which this machine can't read.
    """
    run = config.log.run
    own = Path(os.path.abspath(run)) in Path(os.path.abspath(config.checkpoint.resume)).parents
    if own and (job.scheduler == "kubernetes" or newest_step(Path(_host_path(job, run))) is None):
        raise HvdlmError(
            f"checkpoint.resume {config.checkpoint.resume}: it is in the run's own folder, which can't be read from "
            "here, so that the job could not tell it from what it saves itself: name another folder (--log.run NAME)."
        )


def _host_path(job: Job, folder: str) -> str:
    """Return the path outside of Apptainer's container, where the job script runs, of a folder in the container."""
    if job.scheduler == "kubernetes":  # its script runs in the container, too
        return folder
    for source, target in job.mounts:
        if PurePosixPath(folder).is_relative_to(target):
            return str(PurePosixPath(source) / PurePosixPath(folder).relative_to(target))
    return folder


def _container(job: Job) -> str:
    """Return the prefix that runs a command in the image; empty on Kubernetes, where everything runs in it."""
    if job.image is None or job.scheduler == "kubernetes":
        return ""
    binds = [word for source, target in job.mounts for word in ("--bind", f"{source}:{target}")]
    gpus = ["--nv"] if job.gpus_per_node else []
    return " ".join(map(quote, ["apptainer", "exec", *gpus, *binds, job.image])) + " \\\n    "
