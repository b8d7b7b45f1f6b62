"""Write an HTML page about one run, about several side by side, or about simulated scaling."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def main(arguments: list[str]) -> int:
    """Run ``python -m hvdlm report RUN [RUN2 ...]``, or of files of ``plan --simulate``; return the exit code.

    Raises:
        HvdlmError: an option is wrong, a folder holds no run, or the page can't be written.
    """
    from hvdlm.io.terminal import printable
    from hvdlm_report import page, scaling

    values = parse(arguments)
    paths, output = [Path(run) for run in values.runs], Path(values.output)
    if all(path.is_file() for path in paths):
        sentences = scaling.write(paths, output)
    else:
        sentences = page.write(paths, output, values.tolerance)
    for sentence in sentences:
        print(printable(sentence))
    print(printable(f"{values.output}: open it in a browser"))
    return 0


def parse(arguments: list[str]) -> Any:
    """Return ``runs``, ``output`` and ``tolerance``.

    Raises:
        HvdlmError: no run is named, or too many for one page.
    """
    from hvdlm.configuration import parsing
    from hvdlm.errors import HvdlmError
    from hvdlm_report.page import MAX_RUNS

    parser = parsing.command_parser("report", "Write an HTML page about one run, or about several side by side.")
    parser.add_argument(
        "runs", type=str, nargs="*", help=f"folders of runs, or files of plan --scaling; at most {MAX_RUNS}"
    )
    parser.add_argument(
        "--output", type=str, default="report.html", help="HTML file to write, overwritten if it exists"
    )
    parser.add_argument("--tolerance", type=float, default=1e-4, help="difference in loss that counts as a divergence")
    values = parser.parse_args(arguments)
    count = len(values.runs or [])
    if not 0 < count <= MAX_RUNS:
        raise HvdlmError(f"report: {count} runs are named, expected 1 to {MAX_RUNS}: report runs/a runs/b.")
    return values
