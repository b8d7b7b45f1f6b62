"""A trained run that is used again: the options of commands that do so, its configuration and its checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from hvdlm.checkpoints import discovery, load
from hvdlm.checkpoints.load import Checkpoint
from hvdlm.config import Config, ParallelConfig
from hvdlm.configuration.parsing import Parser, command_parser, parse_config
from hvdlm.errors import HvdlmError
from hvdlm.io.user_folders import similar_run
from hvdlm.training.run import Plan, plan

Weights = Literal["trained", "ema"]
"""Which weights of a checkpoint are used."""

OVERRIDES = "Options with a dot, --framework and --backend override the run's own."


def run_parser(command: str, description: str, epilog: str = OVERRIDES) -> Parser:
    """Return a parser of ``--run``, ``--checkpoint`` and ``--weights``."""
    parser = command_parser(command, description, epilog)
    parser.add_argument("--run", type=str, default="runs/default", help="run folder")
    parser.add_argument(
        "--checkpoint", type=str, default=None, help="checkpoint folder; default: the newest of the run"
    )
    parser.add_argument(
        "--weights",
        type=Weights,
        default="trained",
        help="trained: the weights after the checkpoint's step; ema: their moving average, of runs with train.ema",
    )
    return parser


def run_file(run: str) -> Path:
    """Return the path of a run's config.yaml.

    Raises:
        HvdlmError: there is none.
    """
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise HvdlmError(
            f"--run {run}: there is no run (no config.yaml): name the folder given as --log.run."
            f"{similar_run(Path(run))}"
        )
    return path


def run_config(run: str, arguments: list[str]) -> Config:
    """Return the configuration that a run was trained with, overridden by ``arguments``; its tokenizer stays.

    Its backend was that of another launch: unless ``arguments`` name one, it is chosen for this one.
    """
    names = [argument.partition("=")[0] for argument in arguments]
    tokenizer = Path(run) / "tokenizer.json"
    other_data = "--model.pretrained" in names or any(name.startswith("--data.") for name in names)
    if other_data and "--data.tokenizer" not in names and tokenizer.is_file():
        arguments = [*arguments, "--data.tokenizer", str(tokenizer)]
    return parse_config(["--config", str(run_file(run)), "--backend", "auto", *arguments], "")


def chosen_checkpoint(run: str, checkpoint: str | None, weights: Weights = "trained") -> Checkpoint:
    """Open the folder ``checkpoint`` (``--checkpoint``), or the newest checkpoint of ``run``, with these ``weights``.

    Raises:
        HvdlmError: there is none, it is damaged, or it lacks the weights.
    """
    chosen = _open(run, checkpoint)
    return load.averaged(chosen) if weights == "ema" else chosen


def _open(run: str, checkpoint: str | None) -> Checkpoint:
    if checkpoint is not None:
        return load.open_checkpoint(Path(checkpoint))
    newest = discovery.find(Path(run), "auto")
    if newest is None:
        raise HvdlmError(f"{run} holds no checkpoint yet: train first, or name another run with --run.")
    return newest


def plan_trained(
    run: str, checkpoint: str | None, arguments: list[str], weights: Weights = "trained", whole: bool = False
) -> Plan:
    """Return the plan of a trained run, with the options of its config.yaml overridden by ``arguments``.

    Unless these have options of ``parallel``, its layout is fitted to the ranks that there are. ``whole``: each of them
    has the whole model.
    """
    config = run_config(run, arguments)
    if whole:
        config = replace(config, parallel=ParallelConfig())
    config = replace(config, train=replace(config.train, ema=None))  # one set of weights is used, and not averaged
    # Of the float32 parameters that were saved, as one rank has them, not rounded as several ranks gather them.
    config = replace(config, parallel=replace(config.parallel, zero_gather="fp32" if config.parallel.zero else None))
    resume = str(chosen_checkpoint(run, checkpoint, weights).path)
    fits = not any(argument.startswith("--parallel.") for argument in arguments)
    return replace(plan(config, writes=False, resume=resume, fits=fits), average=weights == "ema")
