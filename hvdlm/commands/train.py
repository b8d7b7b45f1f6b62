"""Train a model: ``python -m hvdlm [train] [OPTIONS]``."""

from __future__ import annotations

import gc
import shlex
from typing import Any

from hvdlm.config import Config
from hvdlm.diagnostics.phases import process
from hvdlm.diagnostics.watchdog import watching
from hvdlm.errors import STOPPED
from hvdlm.io import launcher_env, rank_context
from hvdlm.training.signals import Signals


def main(arguments: list[str]) -> int:
    """Train; with ``--help [SECTION]`` print options, with ``--dry_run`` the plan of the run."""
    if {"--help", "-h"} & set(arguments):
        print(_help(arguments))
        return 0
    if "--dry_run" in arguments:
        from hvdlm.cli import run

        return run(["plan", *(a for a in arguments if a != "--dry_run")])
    signals = Signals(launcher_env.rank_for_messages()).listen()  # before there are other threads, and before imports
    with watching() as watchdog:
        watchdog.code = _train(arguments, signals)
    return watchdog.code


def _train(arguments: list[str], signals: Signals) -> int:
    """Train, and return the exit code."""
    from hvdlm.configuration.parsing import parse_config

    config = rank_context.once("config", lambda: parse_config(arguments))  # parsing takes a tenth of a second
    process.timeout = config.communication.timeout
    from hvdlm.diagnostics.rank_errors import ending_all_ranks
    from hvdlm.training.run import plan
    from hvdlm.training.whole_run import run_training

    def guard(world: Any) -> Any:
        gc.freeze()  # the framework was imported and stays: collections needn't examine it
        return ending_all_ranks(world)

    run, summary = run_training(plan(config), signals, guard)
    stopped = bool(summary["stopped"])
    if run.world.rank == 0 and config.log.progress and not stopped:
        print(_next_commands(config), flush=True)
    return STOPPED if stopped else 0


def _next_commands(config: Config) -> str:
    """Return the run's folder and what can be done with it, for the end of a run."""
    folder = shlex.quote(config.log.run)
    prompt = f" --prompt {shlex.quote(config.log.sample_prompt)}" if config.log.sample_prompt.strip() else ""
    language_model = config.task == "language_model"
    commands = [
        f"generate --run {folder}{prompt}" if language_model else f"convert --run {folder} --output model.safetensors",
        f"evaluate --run {folder}",
        f"report {folder} --output report.html",
    ]
    return "\n".join([f"The run is in {folder}. Next:", *(f"  python -m hvdlm {command}" for command in commands)])


def _help(arguments: list[str]) -> str:
    """Return the first screen, or the options of the section that follows ``--help``."""
    index = next(i for i, argument in enumerate(arguments) if argument in ("--help", "-h"))
    following = arguments[index + 1 : index + 2]
    if following and not following[0].startswith("-"):
        from hvdlm.configuration.parsing import section_help

        return section_help(following[0], [*arguments[:index], *arguments[index + 2 :]])
    from hvdlm.cli import help_text

    return help_text()
