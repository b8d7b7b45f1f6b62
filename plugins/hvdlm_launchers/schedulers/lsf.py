"""Job scripts for LSF."""

from __future__ import annotations

from collections.abc import Sequence

from hvdlm.config import Config
from hvdlm_launchers.schedulers.job import Job
from hvdlm_launchers.schedulers.script import agent, mpirun, script, train, wait

CLIENT = ("bsub",)


def write(job: Job, arguments: Sequence[str], config: Config) -> str:
    """Return the script for bsub.

    LSF requeues the job on exit code 75 (``-Q``). Its warning before the time limit (``-wt``) is a signal to all
    processes of the job: SIGURG, which they ignore by default, and which this script catches.
    """
    body = agent("blaunch") + wait(job, train(job, arguments, config, mpirun(job, "$LSB_DJOB_HOSTFILE")), "URG USR1")
    title = "LSF: bsub < FILE. Ranks save before the time limit; the job is then queued again, and the run resumes."
    return script(title, "#BSUB", _directives(job), job, body + 'exit "$code"\n')


def _directives(job: Job) -> list[str]:
    seconds = job.seconds
    lines = [f"-J {job.name}", f"-n {job.ranks}", f'-R "span[ptile={job.ranks_per_node}]"']
    if job.cpus_per_rank > 1:
        lines.append(f'-R "affinity[core({job.cpus_per_rank})]"')
    if job.gpus_per_node:
        lines.append(f'-gpu "num={job.gpus_per_node}"')
    if job.memory_per_node:
        lines.append(f'-R "rusage[mem={job.memory_per_node}GB/host]"')
    if seconds is not None:
        lines.append(f"-W {_minutes(seconds) // 60:02}:{_minutes(seconds) % 60:02}")
    if job.queue:
        lines.append(f"-q {job.queue}")
    if job.account:
        lines.append(f"-P {job.account}")
    lines += ["-wa URG", f"-wt {_minutes(job.save_seconds)}"]
    return [*lines, *(["-Q 75", "-r"] if job.requeue else ["-rn"]), f"-o {job.log or f'{job.name}-%J.out'}"]


def _minutes(seconds: int) -> int:
    return -(-seconds // 60)
