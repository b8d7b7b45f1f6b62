"""Evaluate a run's model on benchmarks, by lm_eval (EleutherAI's lm-evaluation-harness)."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from hvdlm.errors import HvdlmError, nearest
from hvdlm.io.untrusted_input import shown


def main(arguments: list[str]) -> int:
    """Evaluate, and print the table of results on rank 0."""
    from hvdlm.configuration.parsing import split_overrides
    from hvdlm.diagnostics.phases import process
    from hvdlm.diagnostics.rank_errors import ending_all_ranks
    from hvdlm.diagnostics.watchdog import watching
    from hvdlm.io import safe_files
    from hvdlm.io.terminal import printable
    from hvdlm.training.run import build, connect
    from hvdlm_inference.trained_run import plan_trained

    own, overrides = split_overrides(arguments)
    values = _parse(own)
    if parallel := next((name for name in overrides if name.startswith("--parallel.")), None):
        raise HvdlmError(f"{parallel}: lm-eval has the whole model on every rank: leave it out.")
    if importlib.util.find_spec("lm_eval") is None:
        raise HvdlmError("lm-eval needs the package lm_eval, which is not installed: pip install 'hvdlm[lm_eval]'.")
    if values.output:
        safe_files.check_output(Path(values.output))
    manager, names = _find_tasks(values.tasks, values.include_path)
    with watching() as watchdog:
        connected = connect(plan_trained(values.run, values.checkpoint, overrides, values.weights, whole=True))
        with ending_all_ranks(connected.world):
            run = build(connected)
            if run.task.reads:
                raise HvdlmError(
                    f"lm-eval scores texts, and the run's task {run.config.task} reads more: name another."
                )
            process.begin("evaluating tasks of lm_eval")
            results = _evaluate(run, manager, names, values)
            if run.world.rank == 0:
                print(printable(_table(results)), flush=True)
                if values.output:
                    _write(Path(values.output), {"step": run.start_step, "weights": values.weights, **results})
        watchdog.code = 0
    return 0


def _parse(arguments: list[str]) -> Any:
    from hvdlm_inference.trained_run import run_parser

    parser = run_parser("lm-eval", "Evaluate a run's model on tasks of lm_eval.")
    parser.add_argument(
        "--tasks", type=str, default=None, help="names of tasks, groups or tags of lm_eval, or YAML files, with commas"
    )
    parser.add_argument("--include_path", type=str, default=None, help="folder with further YAML files of tasks")
    parser.add_argument(
        "--num_fewshot", type=int, default=None, help="solved examples before each; default: the task's"
    )
    parser.add_argument("--limit", type=int, default=None, help="documents of each task; default: all")
    parser.add_argument("--output", type=str, default=None, help="JSON file for the results")
    values = parser.parse_args(arguments)
    if not values.tasks:
        raise HvdlmError("--tasks: the value is missing, expected names of tasks, for example --tasks lambada_openai.")
    for name, least in (("num_fewshot", 0), ("limit", 1)):
        if getattr(values, name) is not None and getattr(values, name) < least:
            raise HvdlmError(f"--{name}: got {getattr(values, name)}, expected {least} or more.")
    return values


def _find_tasks(tasks: str, include: str | None) -> tuple[Any, list[str]]:
    """Return lm_eval's manager of tasks, and the names of the wanted ones.

    Raises:
        HvdlmError: there is no such task or file, or lm_eval can't load it.
    """
    from lm_eval.tasks import TaskManager

    folders = [include] if include else []
    if include and not Path(include).is_dir():
        raise HvdlmError(f"--include_path {include}: there is no such folder: name one with YAML files of tasks.")
    names = []
    for name in filter(None, (text.strip() for text in tasks.split(","))):
        if name.endswith((".yaml", ".yml")):
            folders.append(str(Path(name).parent))
            name = _name_in(Path(name))
        names.append(name)
    manager = TaskManager(include_path=folders or None, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):  # reading lm_eval's own, some 10,000 files, takes seconds
        manager = TaskManager(include_path=folders or None)
    for name in names:
        if name not in manager.all_tasks:
            raise HvdlmError(f"--tasks: lm_eval has no task {name!r}; {nearest(name, manager.all_tasks)}")
    try:
        manager.load(names)
    except Exception as error:  # a task's code and data may fail in any way
        raise HvdlmError(
            f"--tasks {','.join(names)}: lm_eval can't load it ({type(error).__name__}: {shown(str(error))}): check "
            "its YAML file, and that its data set is on this machine or can be downloaded."
        ) from error
    return manager, names


def _name_in(path: Path) -> str:
    """Return the name of the task in a YAML file."""
    try:
        named = re.search(r"^task:\s*['\"]?([^\s'\"#]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    except (OSError, UnicodeError) as error:
        raise HvdlmError(f"--tasks {path}: {error}: name a readable YAML file.") from error
    if named is None:
        raise HvdlmError(f'--tasks {path}: it names no task: add a line "task: NAME".')
    return named[1]


def _evaluate(run: Any, manager: Any, names: list[str], values: Any) -> dict[str, Any]:
    """Return lm_eval's results. All ranks call."""
    from lm_eval.evaluator import simple_evaluate

    from hvdlm_lm_eval.model import RunLM

    results: dict[str, Any] = simple_evaluate(
        RunLM(run),
        tasks=names,
        task_manager=manager,
        num_fewshot=values.num_fewshot,
        limit=values.limit,
        log_samples=False,
        bootstrap_iters=100_000 if run.world.rank == 0 else 0,  # for the errors of means, on the rank that shows them
    )
    return results


def _table(results: dict[str, Any]) -> str:
    from lm_eval.utils import make_table

    tables = [make_table(results), *([make_table(results, "groups")] if results.get("groups") else [])]
    return "\n".join(map(str, tables))


def _write(path: Path, results: dict[str, Any]) -> None:
    from hvdlm.io.atomic_files import replace

    kept = ("step", "weights", "results", "groups", "n-shot", "n-samples", "versions", "higher_is_better")
    try:
        replace(path, json.dumps({name: results[name] for name in kept if name in results}, indent=2, default=str))
    except OSError as error:
        raise HvdlmError(f"--output {path}: {error.strerror or error}: name a file in a writable folder.") from error
