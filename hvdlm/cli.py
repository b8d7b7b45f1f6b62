"""The command line: ``python -m hvdlm [COMMAND] [OPTIONS]``; dispatches to ``hvdlm.commands`` and to added commands."""

from __future__ import annotations

import errno
import gc
import importlib
import importlib.metadata
import sys
import time
import traceback
from importlib.metadata import EntryPoint
from typing import Any

from hvdlm.errors import BAD_INPUT, FAILED, HvdlmError, nearest
from hvdlm.io import launcher_env
from hvdlm.io.terminal import on_terminal, printable, surviving_streams
from hvdlm.io.untrusted_input import shown

COMMANDS = {
    "train": "train a model (the default)",
}
"""The command of the core, a module ``hvdlm.commands.NAME`` with ``main(arguments) -> exit code``."""

_ON_RANKS = ("train", "evaluate", "generate", "bench")  # with ``--ranks``, on threads of this process
_RANK_0_SECONDS = 3.0  # given to rank 0 to report its error, usually the same one; the launcher then ends this rank


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit code: 0 done, 1 failed while computing, 2 bad input, 75 stopped and saved."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)  # what follows is another command's
    debug = "--debug" in arguments[:end]
    arguments = [a for a in arguments[:end] if a != "--debug"] + arguments[end:]
    gc.set_threshold(100_000, 20, 20)  # imports and graphs make many objects, nearly all of which stay
    with surviving_streams() as output:
        try:
            code = run(arguments)
        except HvdlmError as error:
            code = refuse(error, debug)
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            name = shown(str(error.filename))
            code = refuse(HvdlmError(f"{name}: {error.strerror}: give a shorter one."), debug)
        output.flush()
    lost = output.is_result and output.error is not None and not output.reader_is_gone
    return code or (FAILED if lost else 0)


def run(arguments: list[str]) -> int:
    """Run the command that ``arguments`` begin with, or train.

    Raises:
        HvdlmError: there is no such command, or the command refuses its input.
    """
    name, rest = "train", arguments
    if arguments and not arguments[0].startswith("-"):
        name, rest = arguments[0], arguments[1:]
    if name in _ON_RANKS and "--dry_run" not in rest and any(a.partition("=")[0] == "--ranks" for a in rest):
        name, rest = "threads", [name, *rest]
    if name in COMMANDS:
        if rest and not rest[0].startswith("-"):
            raise HvdlmError(f"no command {rest[0]!r}; {nearest(rest[0], [*COMMANDS, *added_commands()])}")
        # Without a word, a terminal's user gets help: a run of a thousand steps is what nobody means by that.
        if name == "train" and (rest in (["--help"], ["-h"]) or (not arguments and on_terminal())):
            print(help_text())
            return 0
        return int(importlib.import_module(f"hvdlm.commands.{name}").main(rest))
    entries = added_commands()
    if name not in entries:
        raise HvdlmError(f"no command {name!r}; {nearest(name, [*COMMANDS, *entries])}")
    return int(_load(entries[name]).main(rest))


def added_commands() -> dict[str, EntryPoint]:
    """Return {name: entry point} of the commands that installed packages add (group ``hvdlm.commands``)."""
    return {entry.name: entry for entry in importlib.metadata.entry_points(group="hvdlm.commands")}


def describe_added_commands() -> dict[str, str]:
    """Return {name: first line of its module's docstring} of the commands that installed packages add."""
    described = {}
    for name, entry in sorted(added_commands().items()):
        try:
            line = str(_load(entry).__doc__ or "").strip().partition("\n")[0].rstrip(".")
            described[name] = line[:1].lower() + line[1:]
        except HvdlmError as error:
            described[name] = f"BROKEN: {error}"
    return described


def _load(entry: EntryPoint) -> Any:
    try:
        return entry.load()
    except Exception as error:  # a third party's module may fail in any way
        raise HvdlmError(
            f"command {entry.name} ({entry.value}) does not import: {type(error).__name__}: {error}. "
            "Repair or uninstall it."
        ) from error


def help_text() -> str:
    """Return the first screen: commands, examples and the sections of options."""
    from hvdlm.config import SECTIONS

    commands = COMMANDS | describe_added_commands()
    width = max(map(len, [*commands, *SECTIONS])) + 2
    return "\n".join(
        [
            "usage: python -m hvdlm [COMMAND] [OPTIONS]",
            "",
            "Train language models on one process or, under horovodrun, mpirun or srun, on many ranks.",
            "",
            "commands (python -m hvdlm COMMAND --help):",
            *(f"  {name.ljust(width)}{text}" for name, text in commands.items()),
            "",
            "examples:",
            "  python -m hvdlm --data.path my.txt --log.run runs/mine",
            "  horovodrun -np 2 python -m hvdlm --config run.yaml --checkpoint.resume auto",
            "  python -m hvdlm generate --run runs/mine --prompt 'Once' --tokens 200",
            "",
            "options of train, by section (python -m hvdlm --help SECTION, or --help all):",
            *(f"  {name.ljust(width)}{text}" for name, text in SECTIONS.items()),
            "",
            "  --config FILE         YAML file of options; options given later override earlier ones",
            "  --ranks N             run N ranks as threads of this process (backend threads)",
            "  --print_config        print the resulting configuration and exit",
            "  --debug               show the traceback of an error (every command)",
        ]
    )


def refuse(error: HvdlmError, debug: bool) -> int:
    """Print the error once, on one rank, and return exit code 2."""
    from hvdlm.diagnostics import abort
    from hvdlm.diagnostics.rank_errors import ConnectedError

    if debug:
        print(printable("".join(traceback.format_exception(error))), file=sys.stderr)
    rank = launcher_env.rank_for_messages()
    if rank:
        time.sleep(_RANK_0_SECONDS)
    prefix = f"hvdlm: rank {rank}: " if rank else "hvdlm: "
    if isinstance(error, ConnectedError) and error.world.size > 1:
        abort.refuse(error.world, error, prefix)
    else:
        abort.refuse_unconnected(error, prefix)
    return BAD_INPUT
