"""Job scripts for Slurm."""

from __future__ import annotations

from collections.abc import Sequence

from hvdlm.config import Config
from hvdlm_launchers.schedulers.job import Job, clock
from hvdlm_launchers.schedulers.script import quote, requeue, script, train, wait

CLIENT = ("sbatch",)

# Ranks that stop exit one after the other: the first to exit must not have the others killed (--kill-on-bad-exit=0),
# but a rank that died must (--wait). Since Slurm 22.05 srun doesn't inherit --cpus-per-task from sbatch.
_SRUN = "srun --mpi={mpi} --cpus-per-task={cpus} --kill-on-bad-exit=0 --wait=60"


def write(job: Job, arguments: Sequence[str], config: Config) -> str:
    """Return the script for sbatch; arguments after the script's name are added to the options of train.

    Slurm signals this script, not the ranks, before the time limit. ``scancel`` ends the script and the ranks: SIGTERM
    is not caught, so that a cancelled job doesn't return to the queue.
    """
    command = train(job, arguments, config, _SRUN.format(mpi=quote(job.mpi), cpus=job.cpus_per_rank), more=' "$@"')
    body = wait(job, command, "USR1")
    if job.requeue:
        body += requeue('[ "$code" -eq 75 ]', 'scontrol requeue "$SLURM_JOB_ID"')
    title = "Slurm: sbatch FILE. Ranks save before the time limit; the job is then queued again, and the run resumes."
    return script(title, "#SBATCH", _directives(job), job, body + 'exit "$code"\n')


def _directives(job: Job) -> list[str]:
    seconds = job.seconds
    lines = [f"--job-name={job.name}", f"--nodes={job.nodes}"]
    lines += [f"--ntasks-per-node={job.ranks_per_node}", f"--cpus-per-task={job.cpus_per_rank}"]
    if job.gpus_per_node:
        lines.append(f"--gpus-per-node={job.gpus_per_node}")
    if job.memory_per_node:
        lines.append(f"--mem={job.memory_per_node}G")
    if seconds is not None:
        lines.append(f"--time={clock(seconds)}")
    if job.queue:
        lines.append(f"--partition={job.queue}")
    if job.account:
        lines.append(f"--account={job.account}")
    lines += [f"--signal=B:USR1@{job.save_seconds}", "--requeue" if job.requeue else "--no-requeue"]
    return [*lines, "--open-mode=append", f"--output={job.log or '%x-%j.out'}"]
