"""Job scripts for Slurm."""

from __future__ import annotations

from collections.abc import Sequence

from hvdlm_launchers.schedulers.job import Job, clock
from hvdlm_launchers.schedulers.script import again, script, train, wait

from hvdlm.config import Config

CLIENT = ("sbatch",)

# Ranks end one after the other when they stop: the first must not have the others killed, while one that died has
# (--wait). Since Slurm 22.05 srun has to be told the cores of a rank again.
_SRUN = "srun --mpi={mpi} --cpus-per-task={cpus} --kill-on-bad-exit=0 --wait=60"


def write(job: Job, arguments: Sequence[str], config: Config) -> str:
    """Return the script for sbatch; options of train that follow it there are added.

    Slurm tells this script, not the ranks, that time is nearly over. ``scancel`` ends script and ranks: SIGTERM is not
    caught, so that a cancelled job doesn't come back.
    """
    command = train(job, arguments, config, _SRUN.format(mpi=job.mpi, cpus=job.cpus_per_rank), more=' "$@"')
    body = wait(job, command, "USR1")
    if job.requeue:
        body += again('[ "$code" -eq 75 ]', 'scontrol requeue "$SLURM_JOB_ID"')
    title = "Slurm: sbatch FILE. Ranks save before time is over; the job is then queued again, and goes on from there."
    return script(title, "#SBATCH", _directives(job), job, body + 'exit "$code"\n')


def _directives(job: Job) -> list[str]:
    seconds, lines = job.seconds, [f"--job-name={job.name}", f"--nodes={job.nodes}"]
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
