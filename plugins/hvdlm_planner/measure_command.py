"""``plan --measure``: measure this machine, on one rank or under a launcher."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path


def main(options: Namespace, rest: list[str]) -> int:
    """Measure, or fit what was timed before; add the result to the machine's hardware file or to ``--hardware``'s.

    ``rest``: options of train.
    """
    from hvdlm.configuration.parsing import parse_config
    from hvdlm.diagnostics.watchdog import watching
    from hvdlm.errors import HvdlmError
    from hvdlm.io.safe_files import check_output
    from hvdlm_planner import measure
    from hvdlm_planner.measured_file import measured_path

    if not options.seconds > 0:
        raise HvdlmError(f"--seconds: got {options.seconds:g}, expected more than 0.")
    if options.rounds < 1:
        raise HvdlmError(f"--rounds: got {options.rounds}, expected at least 1.")
    if options.models < 1:
        raise HvdlmError(f"--models: got {options.models}, expected at least 1.")
    config = parse_config(rest, "plan")
    path, steps = Path(options.hardware) if options.hardware else measured_path(), None
    if options.hardware:
        check_output(path)
    if options.fit:
        measure.fit_again(Path(options.fit), path)
        return 0
    if options.steps:
        check_output(steps := Path(options.steps))
    with watching() as watchdog:
        measure.main(config, path, options.seconds, options.rounds, options.models, steps)
        watchdog.code = 0
    return 0
