"""``plan --measure``: measure this machine, on one rank or under a launcher."""

from __future__ import annotations

from pathlib import Path


def main(arguments: list[str]) -> int:
    """Measure, and add the result to the machine's hardware file or to the one that ``--hardware`` names."""
    from hvdlm.configuration.parsing import command_parser, parse_config, split_overrides
    from hvdlm.diagnostics.watchdog import watching
    from hvdlm.errors import HvdlmError
    from hvdlm_planner import measure
    from hvdlm_planner.measured_file import measured_path

    description = (
        "Measure how fast this machine trains, in at most a minute: python -m hvdlm plan --measure for one rank, "
        "python -m hvdlm run -np 4 -- plan --measure for 4 ranks and what they send. Each is added to the file."
    )
    parser = command_parser("plan --measure", description, "--framework and options with a dot are those of train.")
    parser.add_argument("--hardware", type=str, default=None, help="file to add to; default: that of this machine")
    parser.add_argument("--seconds", type=float, default=measure.SECONDS, help="that it may take")
    own, overrides = split_overrides(arguments)
    values = parser.parse_args(own)
    if not values.seconds > 0:
        raise HvdlmError(f"--seconds: got {values.seconds:g}, expected more than 0.")
    config = parse_config(overrides, "plan")
    with watching() as watchdog:
        measure.main(config, Path(values.hardware) if values.hardware else measured_path(), values.seconds)
        watchdog.code = 0
    return 0
