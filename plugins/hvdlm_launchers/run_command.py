"""Start ranks on this machine with the launcher at hand: run -np 2 -- train OPTIONS."""

from __future__ import annotations

from hvdlm.errors import HvdlmError

_DESCRIPTION = (
    "python -m hvdlm run [-np 2] [--backend NAME] -- [COMMAND] OPTIONS: start ranks on this machine with the launcher "
    "at hand (mpirun, or horovodrun for Gloo), and show their output as that of one program. COMMAND is train (the "
    "default), evaluate, generate or bench. On clusters, use horovodrun, mpirun, srun, or python -m hvdlm launch."
)
_OWN = ("-np", "--np", "--backend")


def main(arguments: list[str]) -> int:
    """Start the ranks; return the exit code of the run, which launchers hide.

    Raises:
        HvdlmError: an option is wrong, or there is no launcher.
    """
    from hvdlm.configuration.parsing import command_parser
    from hvdlm_launchers import local_launch

    own, command = split(arguments)
    parser = command_parser(
        "run",
        _DESCRIPTION,
        "The first Ctrl-C asks the run to save and stop, a second one ends it. Exit codes are those of the command: 0 "
        "done, 1 failed, 2 refused, 75 stopped and saved.",
    )
    parser.add_argument("-np", "--np", type=int, default=2, help="number of ranks")
    parser.add_argument(
        "--backend", type=str, default=None, help="mpi, gloo, nccl or mpi4py; default: mpi, or what is installed"
    )
    values = parser.parse_args(own)
    if values.np < 1:
        raise HvdlmError(f"-np: got {values.np}, expected 1 or more.")
    return local_launch.run(values.np, values.backend, command)


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return this command's own options, and the command to start: after ``--``, or after the last own option."""
    if "--" in arguments:
        end = arguments.index("--")
        return arguments[:end], arguments[end + 1 :]
    position = 0
    while position < len(arguments):
        name, sign, _ = arguments[position].partition("=")
        if name in ("--help", "-h"):
            return arguments[: position + 1], []
        if name not in _OWN:
            break
        position += 1 if sign else 2
    return arguments[:position], arguments[position:]
