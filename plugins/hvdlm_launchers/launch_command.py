"""Write the job file of a run for Slurm, PBS, LSF or Kubernetes, and submit it."""

from __future__ import annotations

from typing import Any


def main(arguments: list[str]) -> int:
    """Run ``python -m hvdlm launch [OPTIONS] -- train ...``; return the exit code.

    Raises:
        HvdlmError: an option, the job or the run is wrong, or the scheduler refuses the job.
    """
    from hvdlm.configuration import parsing
    from hvdlm_launchers.launch import launch

    values, job, train = parse(arguments)
    return launch(job, train, lambda given: parsing.parse_config(given), values.output, values.submit)


def parse(arguments: list[str]) -> tuple[Any, Any, list[str] | None]:
    """Return ``output`` and ``submit``, the ``Job``, and the arguments of ``train`` after ``--``.

    The last is None if ``--`` is missing or is followed by another command than ``train``.
    """
    from hvdlm.configuration import parsing, schema
    from hvdlm_launchers.schedulers.job import Job
    from hvdlm_launchers.train_command import train_arguments

    description = (
        "python -m hvdlm launch [OPTIONS] -- train [OPTIONS of train]: write the job file of a run for Slurm, PBS, LSF "
        "or Kubernetes, and submit it."
    )
    parser = parsing.command_parser("launch", description)
    parser.add_class_arguments(Job)
    parser.add_argument("--output", type=str, default=None, help="file to write; default: standard output")
    parser.add_argument("--submit", action="store_true", help="submit the job: sbatch, qsub, bsub or kubectl")
    parser.known = {**schema.types_of({"": Job}), "output": str, "submit": bool}
    end = arguments.index("--") if "--" in arguments else len(arguments)
    values = parser.parse_args(arguments[:end])
    job = Job(**{name: values[name] for name in Job.__dataclass_fields__})
    if end == len(arguments):
        return values, job, None
    return values, job, train_arguments(["-m", "hvdlm", *arguments[end + 1 :]])
