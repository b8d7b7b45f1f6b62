"""``plan --measure``: measure this machine, on one rank or under a launcher."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path


def main(options: Namespace, rest: list[str]) -> int:
    """Measure, and add the result to the machine's hardware file or to the one that ``--hardware`` names.

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
    config = parse_config(rest, "plan")
    path = Path(options.hardware) if options.hardware else measured_path()
    if options.hardware:
        check_output(path)
    with watching() as watchdog:
        measure.main(config, path, options.seconds)
        watchdog.code = 0
    return 0
