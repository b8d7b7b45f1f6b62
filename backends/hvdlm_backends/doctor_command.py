"""Check this machine's MPI, Horovod and frameworks, or diagnose why a run (--run) hung or died."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hvdlm_backends.machine_checks import Finding


def main(arguments: list[str]) -> int:
    """Print the findings about this machine, or about the run that ``--run`` names; 1 where there is a problem."""
    from hvdlm.configuration.parsing import command_parser

    parser = command_parser(
        "doctor", "Check this machine's MPI, Horovod and frameworks, or diagnose a run that failed."
    )
    parser.add_argument("--run", type=str, default=None, help="run folder to diagnose")
    run = parser.parse_args(arguments).run
    return examine_machine() if run is None else explain_run(Path(run))


def examine_machine() -> int:
    """Print the findings about this machine; return 0 where there is no problem, else 1."""
    from hvdlm import plugins
    from hvdlm.io.terminal import printable
    from hvdlm_backends.machine_checks import check
    from hvdlm_backends.probes import gather

    findings = check(gather(plugins.probes()))
    print(printable(table(findings)), flush=True)
    return 1 if any(finding.level == "problem" for finding in findings) else 0


def table(findings: Sequence[Finding]) -> str:
    """Return the findings as aligned lines, and the number of problems and warnings."""
    width = max(len(finding.subject) for finding in findings)
    lines = [f"{finding.level:<8} {finding.subject:<{width}}  {finding.text}" for finding in findings]
    counts = {level: sum(finding.level == level for finding in findings) for level in ("problem", "warning")}
    return "\n".join([*lines, f"{counts['problem']} problem(s), {counts['warning']} warning(s)"])


def explain_run(run: Path) -> int:
    """Print how the ranks of a run that hung or died ended, and where they differ; return 0.

    Raises:
        HvdlmError: there are no flight recorders to read.
    """
    from hvdlm.diagnostics import failure_files
    from hvdlm.errors import HvdlmError
    from hvdlm.io.terminal import printable
    from hvdlm.io.user_folders import similar_run
    from hvdlm_diagnosis import diagnosis
    from hvdlm_diagnosis.recorder_reader import read_diagnosis, read_files

    folder = failure_files.files_folder(run)
    files = read_files(folder)
    if not files.recordings:
        if not run.is_dir():
            raise HvdlmError(f"--run {run}: there is no such folder: name that of a run.{similar_run(run)}")
        if text := read_diagnosis(folder):  # ranks were not connected, or there was only one
            print(text, flush=True)
            return 0
        reason = "the run ended normally, or its ranks were killed before they connected."
        if files.unreadable:
            reason = files.unreadable[0]
        raise HvdlmError(f"--run {run}: there is no flight recorder in {folder}: {reason}")
    print(printable(diagnosis.report(files)), flush=True)
    return 0
