"""The command line: ``python -m hvdlm [COMMAND] [options]``; ``COMMANDS`` are the commands, train is the default."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from hvdlm.configuration import parsing
from hvdlm.errors import HvdlmError, nearest

COMMANDS = {
    "train": "train a model (the default)",
    "evaluate": "compute a run's figures on the whole validation split",
    "generate": "write text with a run's model",
    "convert": "merge a checkpoint into one safetensors file, or a folder for Hugging Face transformers",
    "report": "write a page of one run, or of several side by side",
    "prepare": "turn text into token files",
    "plugins": "list what is installed, what it provides and its version",
    "doctor": "examine this machine's MPI, Horovod and frameworks, or why a run (--run) hung or died",
    "bench": "measure what collectives cost between the ranks of this launch",
    "supervise": "start a run, and start it again from its newest checkpoint where it fails",
    "launch": "write the job file of a run for Slurm, PBS, LSF or Kubernetes, and submit it",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit code: 0 done, 1 failed while computing, 2 bad input, 75 stopped and saved."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    own = arguments.index("--") if "--" in arguments else len(arguments)  # what follows is another command
    debug = "--debug" in arguments[:own]
    arguments = [a for a in arguments[:own] if a != "--debug"] + arguments[own:]
    command = arguments.pop(0) if arguments and arguments[0] in COMMANDS else ""
    try:
        if arguments and not arguments[0].startswith("-") and command != "report":
            from hvdlm import plugins as installed

            return installed.run_command(arguments[0], arguments[1:], COMMANDS, added=not command)
        return _COMMANDS[command or "train"](arguments)
    except HvdlmError as error:
        return _refuse(error, debug)
    except BrokenPipeError:
        return 0


def _all_commands(arguments: list[str]) -> dict[str, str]:
    """Return what ``--help`` lists: of packages that add commands, modules are imported, so only where it is asked."""
    if not {"--help", "-h"} & set(arguments):
        return COMMANDS
    from hvdlm import plugins as installed

    return COMMANDS | installed.describe_commands()


def _refuse(error: HvdlmError, debug: bool) -> int:
    """Print the sentence once and end with code 2."""
    if debug:
        traceback.print_exception(error)
    rank = _launch_rank()
    if rank:
        # Rank 0 most often has the same to say: it says it, and the launcher then ends this rank.
        time.sleep(3)
    prefix = f"hvdlm: rank {rank}: " if rank else "hvdlm: "
    world = getattr(error, "world", None)
    if world is None or world.size == 1:
        print(prefix + str(error), file=sys.stderr, flush=True)
        return 2
    from hvdlm.diagnostics import abort

    abort.refuse(world, error, prefix)
    return 2


def _launch_rank() -> int:
    for name in ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0


def _guard(run: Any, action: Callable[[], Any]) -> int:
    """Do what all ranks compute; an error on this rank ends all of them with its message, told once."""
    try:
        action()
    except KeyboardInterrupt:
        print(f"hvdlm: rank {run.world.rank}: interrupted", file=sys.stderr, flush=True)
        run.world.abort(130)
    except HvdlmError as error:
        error.world = run.world  # type: ignore[attr-defined]
        raise
    except Exception as error:
        from hvdlm.diagnostics import abort

        abort.end(run.world, error)
    run.world.close()
    run.world.recorder.discard()
    return 0


def train(arguments: list[str]) -> int:
    """``python -m hvdlm train``."""
    if "--dry_run" in arguments:
        from hvdlm.commands import plan

        return plan.main(parsing.parse_config([a for a in arguments if a != "--dry_run"], COMMANDS))
    from hvdlm.errors import STOPPED
    from hvdlm.training.signals import Signals

    signals = Signals(_launch_rank()).listen()  # before what takes time
    config = parsing.parse_config(arguments, _all_commands(arguments))
    from hvdlm.training import run as runs

    run = _started(runs.plan(config))
    from hvdlm.telemetry import default_plugins
    from hvdlm.training import run_folder
    from hvdlm.training.loop import train as loop

    for plugin in default_plugins(run.config):
        run.manager.register(plugin)

    stopped = False

    def action() -> None:
        nonlocal stopped
        stopped = bool(loop(run, signals)["stopped"])
        if config.log.sample_tokens and not stopped:
            from hvdlm.inference.generation import write
            from hvdlm.inference.sampling import Sampling

            text = write(run, config.log.sample_prompt, config.log.sample_tokens, Sampling(seed=config.train.seed))
            if run.world.rank == 0:
                run_folder.keep_sample(run, text)
        signals.ignore()

    return _guard(run, action) or (STOPPED if stopped else 0)


def _started(plan: Any) -> Any:
    """Start the run; an error on this rank, once ranks have met, ends all of them with its message, told once."""
    from hvdlm.training import run as runs

    try:
        return runs.start(plan)
    except HvdlmError:
        raise
    except Exception as error:
        world = getattr(error, "world", None)
        if world is None:
            raise
        from hvdlm.diagnostics import abort

        abort.end(world, error)


def _open(values: Any, arguments: list[str]) -> Any:
    """Open a trained run on this machine, with the options of its config.yaml and those given after them."""
    from hvdlm.training import run as runs

    config = parsing.run_config(values.run, arguments)
    config.checkpoint.resume = "none"
    plan = runs.plan(config, fresh=False)
    plan.resume = str(_checkpoint(values).path)
    return _started(plan)


def _checkpoint(values: Any) -> Any:
    """Open the checkpoint that --checkpoint names, or the newest of --run."""
    from hvdlm.checkpoints import load

    if values.checkpoint is not None:
        return load.open_checkpoint(_path(values.checkpoint))
    found = load.find(_path(values.run), "auto")
    if found is None:
        raise HvdlmError(f"{values.run} holds no checkpoint yet: train first, or name another run with --run.")
    return found


def _path(text: str) -> Any:
    from pathlib import Path

    return Path(text)


def evaluate(arguments: list[str]) -> int:
    """``python -m hvdlm evaluate --run RUN``."""
    values, rest = parsing.parse_evaluate(arguments)
    run = _open(values, rest)

    def action() -> None:
        import json

        from hvdlm.training.loop import evaluate as figures

        found = figures(run)
        if run.world.rank == 0:
            print(json.dumps({"step": run.checkpoint.step, **found}), flush=True)

    return _guard(run, action)


def generate(arguments: list[str]) -> int:
    """``python -m hvdlm generate --run RUN --prompt TEXT``."""
    values, rest = parsing.parse_generate(arguments)
    from hvdlm.inference.generation import read_prompt, write
    from hvdlm.inference.sampling import Sampling

    sampling = Sampling(values.temperature, values.top_k, values.top_p, values.seed)
    for name in ("tokens", "num_samples"):
        if getattr(values, name) < 1:
            raise HvdlmError(f"--{name}: got {getattr(values, name)}, expected 1 or more.")
    text = None if values.prompt_file is None else read_prompt(_path(values.prompt_file))
    run = _open(values, rest)
    prompt = values.prompt if text is None else text
    if prompt == "-":  # a launcher gives standard input to rank 0 only
        prompt = run.world.broadcast_object(sys.stdin.read() if run.world.rank == 0 else None)

    def action() -> None:
        for number in range(values.num_samples):
            if number and run.world.rank == 0:
                print("-" * 16, flush=True)
            write(run, prompt, values.tokens, dataclasses.replace(sampling, seed=values.seed + number))

    return _guard(run, action)


def convert(arguments: list[str]) -> int:
    """``python -m hvdlm convert --run RUN --output FILE.safetensors``, or with ``--format huggingface`` a folder."""
    values = parsing.parse_convert(arguments)
    found, output = _checkpoint(values), _path(values.output)
    if values.format == "huggingface":
        from hvdlm_huggingface.export import export

        tokenizer = None if values.checkpoint else _path(values.run) / "tokenizer.json"
        count, note = export(found, tokenizer, output, values.base)
        print(f"{output}: {count:,} parameters of {found.path} for transformers; {note}")
        return 0
    from hvdlm.checkpoints.merge import convert as merge

    count = merge(found, output, values.base)
    print(f"{output}: {count:,} parameters of {found.path}")
    return 0


def report(arguments: list[str]) -> int:
    """``python -m hvdlm report RUN [RUN2 ...]``."""
    values = parsing.parse_report(COMMANDS["report"], arguments)
    from hvdlm_report import page

    for sentence in page.write([_path(run) for run in values.runs], _path(values.output), values.tolerance):
        print(sentence)
    print(f"{values.output}: open it in a browser")
    return 0


def prepare(arguments: list[str]) -> int:
    """``python -m hvdlm prepare --data.path ... --output FOLDER``."""
    values = parsing.parse_prepare(arguments)
    try:
        if values.data.mixture is None:
            from hvdlm.data.preparation import prepare as write

            found = {"": write(values.data, values.output, values.workers)}
        else:
            from hvdlm.data.mixture import prepare as write_all

            found = write_all(values.data, values.output, values.workers)
    except KeyboardInterrupt:
        print("hvdlm: interrupted; the same command goes on where it was", file=sys.stderr, flush=True)
        return 130
    for name, data in found.items():
        print(
            f"{name + ': ' if name else ''}{data.folder}: {len(data.train):,} training and "
            f"{len(data.validation):,} validation tokens, vocabulary of {data.tokenizer.vocab:,}"
        )
    return 0


def plugins(arguments: list[str]) -> int:
    """``python -m hvdlm plugins``."""
    parsing.parse_none("plugins", COMMANDS["plugins"], arguments)
    from hvdlm.plugins import describe

    rows = [("plugin", "from", "module", "provides"), *describe()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) + "  " + row[3])
    return 0


def doctor(arguments: list[str]) -> int:
    """``python -m hvdlm doctor``, or of a run: ``doctor --run RUN``."""
    values = parsing.parse_doctor(COMMANDS["doctor"], arguments)
    from hvdlm.commands import doctor as examination

    return examination.main() if values.run is None else examination.tell_run(_path(values.run))


def bench(arguments: list[str]) -> int:
    """``python -m hvdlm bench``."""
    values, config = parsing.parse_bench(arguments)
    from hvdlm.communication import collective_benchmark as benchmark
    from hvdlm.training import run as runs

    chosen = values.collectives or benchmark.COLLECTIVES
    for name in chosen:
        if name not in benchmark.COLLECTIVES:
            raise HvdlmError(f"--collectives: no collective {name!r}; {nearest(name, benchmark.COLLECTIVES)}")
    counts = benchmark.sizes(values.smallest, values.largest)
    run = runs.meet(config)
    return _guard(run, lambda: benchmark.main(run.world, run.framework, chosen, counts, _path(values.output)))


def supervise(arguments: list[str]) -> int:
    """``python -m hvdlm supervise -- COMMAND``."""
    settings, command = parsing.parse_supervise(arguments)
    from hvdlm_launchers.supervise import supervise as watch

    return watch(settings, command, lambda given: parsing.parse_config(given, COMMANDS))


def launch(arguments: list[str]) -> int:
    """``python -m hvdlm launch -- train ...``."""
    values, job, run = parsing.parse_launch(COMMANDS["launch"], arguments)
    from hvdlm_launchers.launch import launch as queue

    return queue(job, run, lambda given: parsing.parse_config(given, COMMANDS), values.output, values.submit)


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "evaluate": evaluate,
    "generate": generate,
    "convert": convert,
    "report": report,
    "prepare": prepare,
    "plugins": plugins,
    "doctor": doctor,
    "bench": bench,
    "supervise": supervise,
    "launch": launch,
}
