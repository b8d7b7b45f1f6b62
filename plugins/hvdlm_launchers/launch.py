"""``python -m hvdlm launch``: checks a job and the run in it, writes the job file, and submits it where asked."""

from __future__ import annotations

import copy
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from hvdlm_launchers.schedulers import kubernetes, lsf, pbs, slurm
from hvdlm_launchers.schedulers.job import Job, check

from hvdlm import plugins
from hvdlm.config import Config
from hvdlm.configuration import validation
from hvdlm.errors import HvdlmError, nearest
from hvdlm.parallel.mesh import make_mesh
from hvdlm.protocols.scheduler import Scheduler

_BUILT_IN: Mapping[str, Scheduler] = {"slurm": slurm, "pbs": pbs, "lsf": lsf, "kubernetes": kubernetes}


def launch(
    job: Job, arguments: list[str] | None, read: Callable[[list[str]], Config], output: str | None, submit: bool
) -> int:
    """Write the file of ``job`` to ``output``, or submit it, or print it; return the exit code.

    ``arguments``: those of ``python -m hvdlm train``, None where something else is to be run; ``read``: makes a
    configuration of them.

    Raises:
        HvdlmError: the first thing found wrong.
    """
    if arguments is None:
        raise HvdlmError("no run: write python -m hvdlm launch [OPTIONS] -- train --config run.yaml ...")
    scheduler = find(job.scheduler)
    check(job)
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
    """Return the scheduler of this name: a built-in one, or one of the plugin of this name.

    Raises:
        HvdlmError: nobody knows it.
    """
    known = dict(_BUILT_IN)
    if name not in known and name in plugins.installed():
        for more in plugins.load([name]).hook.hvdlm_schedulers():
            known.update(more)
    if name in known:
        return known[name]
    if not name:
        raise HvdlmError(f"--scheduler: the value is missing, expected one of {', '.join(known)}.")
    raise HvdlmError(f"--scheduler: no scheduler {name!r}; {nearest(name, known)}")


def _check_run(job: Job, config: Config) -> None:
    """Check the run as its ranks would, as far as this machine can tell."""
    config = copy.deepcopy(config)
    if job.image is not None:
        config.log.run = "."  # the container's folders are not here
    if config.log.overwrite:
        raise HvdlmError("log.overwrite: the job goes on in its folder: delete the old run, or name another folder.")
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
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise HvdlmError(f"--output {path}: {error.strerror}: name a file that can be written.") from error


def _submit(scheduler: Scheduler, text: str) -> None:
    command = list(scheduler.CLIENT)
    try:
        code = subprocess.run(command, input=text, text=True).returncode
    except OSError as error:
        raise HvdlmError(
            f"--submit: {command[0]} can't be started here ({error.strerror}): write the file with --output, and "
            "submit it where the scheduler is."
        ) from error
    if code:
        raise HvdlmError(f"--submit: {command[0]} refused the job with code {code}; what it says stands above.")
