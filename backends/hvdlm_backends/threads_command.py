"""Run a command on ranks that are threads of this process: threads [train] --ranks 4 OPTIONS."""

from __future__ import annotations

_HELP = (
    "usage: python -m hvdlm threads [COMMAND] --ranks N OPTIONS\n\n"
    "python -m hvdlm --backend threads --ranks 4 OPTIONS runs 4 ranks as threads of this process, with collectives in "
    "memory. So do evaluate, generate and bench with --ranks. With --debug, every command shows the traceback of an "
    "error."
)


def main(arguments: list[str]) -> int:
    """Run the command on every rank, each in a thread of its own; return the exit code.

    Raises:
        HvdlmError: there can't be as many ranks, or a rank refuses its input.
    """
    from hvdlm import cli
    from hvdlm.errors import HvdlmError
    from hvdlm_backends.threads import checked
    from hvdlm_backends.threads_launch import run_command

    if not arguments or arguments[0] in ("--help", "-h"):
        print(_HELP)
        return 0
    index = next((i for i, a in enumerate(arguments) if a.partition("=")[0] == "--ranks"), None)
    if index is None:
        raise HvdlmError("--ranks: missing: python -m hvdlm --backend threads --ranks 4, for example.")
    _, sign, value = arguments[index].partition("=")
    ranks = value if sign else "".join(arguments[index + 1 : index + 2])
    command = arguments[:index] + arguments[index + (1 if sign else 2) :]
    return run_command(checked(ranks), lambda: cli.run(command))
