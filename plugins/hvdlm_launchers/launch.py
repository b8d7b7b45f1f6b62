"""Checks a job and the run in it, writes the job file, and submits it on request (``python -m hvdlm launch``)."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hvdlm import plugins
from hvdlm.config import Config
from hvdlm.configuration import validation
from hvdlm.errors import HvdlmError, nearest
from hvdlm.io.atomic_files import replace as replace_file
from hvdlm.io.safe_files import check_output
from hvdlm.parallel.mesh import make_mesh
from hvdlm.protocols.scheduler import Scheduler
from hvdlm_launchers.schedulers.job import Job, check
from hvdlm_launchers.schedulers.script import check_resume

_BUILT_IN = "schedulers"  # the plugin with Slurm, PBS, LSF and Kubernetes


def launch(
    job: Job, arguments: list[str] | None, read: Callable[[list[str]], Config], output: str | None, submit: bool
) -> int:
    """Write the job file to ``output`` and submit it, each if asked for, or else print it; return the exit code.

    ``arguments``: those of ``python -m hvdlm train``, None if another command is given; ``read``: parses them.

    Raises:
        HvdlmError: the first mistake in the job or the run, or the scheduler refuses the job.
    """
    if arguments is None:
        raise HvdlmError("no run: write python -m hvdlm launch [OPTIONS] -- train --config run.yaml ...")
    scheduler = find(job.scheduler)
    check(job)
    if output is not None:
        check_output(Path(output))
    config = read(arguments)
    _check_run(job, config)
    text = scheduler.write(job, arguments, config)
    if output is not None:
        _write(Path(output), text)
    if submit:
        _submit(scheduler, text)
    elif output is None:
        print(text, end="")
    return 0


def find(name: str) -> Scheduler:
    """Return the scheduler ``name``: a built-in one, or one that the plugin of this name provides.

    Raises:
        HvdlmError: there is no such scheduler.
    """
    known: dict[str, Scheduler] = {}
    for plugin in (_BUILT_IN, name):
        if name not in known:
            for schedulers in plugins.load([plugin]).hook.hvdlm_schedulers():
                known.update(schedulers)
    if name in known:
        return known[name]
    if not name:
        raise HvdlmError(f"--scheduler: the value is missing, expected one of {', '.join(known)}.")
    raise HvdlmError(f"--scheduler: no scheduler {name!r}; {nearest(name, known)}")


def _check_run(job: Job, config: Config) -> None:
    """Make the checks of a run that need no more than its configuration."""
    check_resume(job, config)
    if job.image is not None:  # the container's folders don't exist on this machine
        config = replace(config, log=replace(config.log, run="."))
    if config.log.overwrite:
        raise HvdlmError("log.overwrite: the job resumes in its folder: delete the old run, or name another folder.")
    if "-" in (*config.data.paths, *config.data.validation_paths):
        raise HvdlmError("data.path -: a job has no standard input: python -m hvdlm prepare --output FOLDER first.")
    if config.backend == "nccl" and job.ranks_per_node > job.gpus_per_node:
        raise HvdlmError(
            f"--gpus_per_node: got {job.gpus_per_node}, backend nccl needs one for each of {job.ranks_per_node} ranks."
        )
    if config.framework not in plugins.installed():
        raise plugins.unknown("framework", config.framework)
    validation.values(config)
    validation.layout(config, make_mesh(job.ranks, config.parallel))


def _write(path: Path, text: str) -> None:
    try:
        replace_file(path, text)
    except OSError as error:
        raise HvdlmError(f"--output {path}: {error.strerror}: name a file that can be written.") from error


def _submit(scheduler: Scheduler, text: str) -> None:
    command = list(scheduler.CLIENT)
    try:
        code = subprocess.run(command, input=text, text=True).returncode
    except OSError as error:
        raise HvdlmError(
            f"--submit: {command[0]} can't be started here ({error.strerror}): write the file with --output, and "
            "submit it on a machine that has the scheduler."
        ) from error
    if code:
        raise HvdlmError(f"--submit: {command[0]} refused the job with code {code}; its message is above.")
