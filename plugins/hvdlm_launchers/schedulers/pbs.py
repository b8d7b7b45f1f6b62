"""Job scripts for PBS Professional and OpenPBS."""

from __future__ import annotations

from collections.abc import Sequence

from hvdlm_launchers.schedulers.job import Job, clock
from hvdlm_launchers.schedulers.script import again, agent, mpirun, script, train, wait

from hvdlm.config import Config
from hvdlm.errors import HvdlmError

CLIENT = ("qsub",)


def write(job: Job, arguments: Sequence[str], config: Config) -> str:
    """Return the script for qsub.

    PBS gives no signal before time is over, so ``timeout`` does. ``qrerun`` is for operators, so a script whose run has
    saved submits itself anew: as a new job. SIGTERM (``qdel``) is not caught: a deleted job doesn't come back.

    Raises:
        HvdlmError: there is no time limit to count from.
    """
    seconds = job.seconds
    if seconds is None:
        raise HvdlmError(
            "--time: the value is missing, and PBS gives no signal before a queue's own limit: --time 24:00:00."
        )
    early = f"timeout --foreground --preserve-status --signal=USR1 $(({seconds - job.save_seconds} - SECONDS)) \\\n    "
    body = 'cd "$PBS_O_WORKDIR" || exit 1\n' + agent("pbs_tmrsh")
    body += wait(job, early + train(job, arguments, config, mpirun(job, "$PBS_NODEFILE")), "USR1")
    if job.requeue:
        body += again('[ "$code" -eq 75 ]', 'qsub "$0"')
    title = "PBS: qsub FILE. Ranks save before time is over; the job is then submitted again, and goes on from there."
    return script(title, "#PBS", _directives(job, seconds), job, body + 'exit "$code"\n')


def _directives(job: Job, seconds: int) -> list[str]:
    chunk = f"{job.nodes}:ncpus={job.cpus_per_node}:mpiprocs={job.ranks_per_node}:ompthreads={job.cpus_per_rank}"
    if job.gpus_per_node:
        chunk += f":ngpus={job.gpus_per_node}"
    if job.memory_per_node:
        chunk += f":mem={job.memory_per_node}gb"
    lines = [f"-N {job.name}", f"-l select={chunk}", "-l place=scatter", f"-l walltime={clock(seconds)}"]
    if job.queue:
        lines.append(f"-q {job.queue}")
    if job.account:
        lines.append(f"-A {job.account}")
    return [*lines, f"-r {'y' if job.requeue else 'n'}", "-j oe", *([f"-o {job.log}"] if job.log else [])]
