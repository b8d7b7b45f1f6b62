"""Start a run, and restart it from its newest checkpoint when it fails."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hvdlm_launchers.settings import Settings


def main(arguments: list[str]) -> int:
    """Run ``python -m hvdlm supervise [OPTIONS] -- COMMAND``; return the exit code.

    Raises:
        HvdlmError: an option or the command is wrong.
    """
    from hvdlm.configuration import parsing
    from hvdlm_launchers.supervise import supervise

    settings, command = parse(arguments)
    return supervise(settings, command, lambda given: parsing.parse_config(given))


def parse(arguments: list[str]) -> tuple[Settings, list[str]]:
    """Return the settings and the command after ``--``."""
    from hvdlm.configuration import parsing, schema
    from hvdlm_launchers.settings import Settings

    description = (
        "python -m hvdlm supervise [OPTIONS] -- COMMAND...: start a run (COMMAND ends with the options of python -m "
        "hvdlm train), and restart it from its newest checkpoint when it fails."
    )
    epilog = "Exit codes: 0 done, 1 given up, 2 refused, 75 stopped and saved."
    parser = parsing.command_parser("supervise", description, epilog)
    parser.add_class_arguments(Settings)
    parser.known = schema.types_of({"": Settings})
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return Settings(**parser.parse_args(arguments[:end]).as_dict()), arguments[end + 1 :]
