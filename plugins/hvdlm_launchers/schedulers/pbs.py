"""Job scripts for PBS Professional and OpenPBS."""

from __future__ import annotations

from collections.abc import Sequence

from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm_launchers.schedulers.job import Job, clock
from hvdlm_launchers.schedulers.script import agent, mpirun, requeue, script, train, wait

CLIENT = ("qsub",)


def write(job: Job, arguments: Sequence[str], config: Config) -> str:
    """Return the script for qsub.

    PBS sends no signal before the time limit, so ``timeout`` does. ``qrerun`` is reserved for operators, so the script
    submits itself as a new job after the run has saved. SIGTERM (``qdel``) is not caught: a deleted job doesn't return.

    Raises:
        HvdlmError: there is no time limit to count from.
    """
    seconds = job.seconds
    if seconds is None:
        raise HvdlmError(
            "--time: the value is missing, and PBS sends no signal before a queue's own limit: give --time 24:00:00."
        )
    with_timeout = (
        f"timeout --foreground --preserve-status --signal=USR1 $(({seconds - job.save_seconds} - SECONDS)) \\\n    "
    )
    body = 'cd "${PBS_O_WORKDIR:?}" || exit 1\n' + agent("pbs_tmrsh")
    body += wait(job, with_timeout + train(job, arguments, config, mpirun(job, "$PBS_NODEFILE")), "USR1")
    if job.requeue:
        body += requeue('[ "$code" -eq 75 ]', 'qsub "$0"')
    title = "PBS: qsub FILE. Ranks save before the time limit; the job is then submitted again, and the run resumes."
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
