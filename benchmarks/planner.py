"""Predicted beside measured seconds of a step, over configurations that the model was not made from.

    python benchmarks/planner.py [torch tensorflow] [--folder runs/planner] [--groups 1 2 4 1e9 1e8]
        [--configurations first|second|third|fourth] [--short]

For each group of ranks (1, 2 or 4 on this machine; two hosts with a network of 1 Gbit/s or 100 Mbit/s between them),
the machine is measured by ``plan --measure``, up to three times where this reports that the machine was busy; then all
configurations of the group take turns in one launch. The figures are the median and the worst of the errors of
predicted seconds; a table follows. What is measured is kept in the folder: a run that was interrupted continues there,
and ``--again`` starts afresh.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import FOLDER, Bar, check_known, emitted, environment, make_parser, parse, python_command, report
from hosts import Missing, open_hosts
from planner_configurations import FIRST, NETWORKS, SHORT_GROUPS, TABLES, Options
from planner_worker import make_config, vocabulary

from hvdlm import plugins
from hvdlm.io.atomic_files import replace
from hvdlm.parallel.mesh import make_mesh
from hvdlm.planning.hardware import read_hardware
from hvdlm.planning.step_time import StepTime, predict_time
from hvdlm.training.run import load_plugins
from hvdlm_planner.habits import habits_of
from hvdlm_planner.measure import BUSY, fit_again

MEDIAN, WORST = Bar(at_most=10.0), Bar(at_most=25.0)  # per cent
FULL = {"folder": "runs/planner", "groups": list(FIRST), "rounds": 9, "seconds": 0.8, "measure_seconds": 60.0}
FULL |= {"measure_rounds": 1000, "measure_models": 1000}
SHORT = {"groups": ["2"], "rounds": 2, "seconds": 0.02, "measure_seconds": 120.0, "measure_rounds": 1}
SHORT |= {"measure_models": 17}  # of one rank as few as can be, and one of every kind of several ranks
_TIMEOUT = 600.0  # seconds of a launch
_ATTEMPTS = 3  # measurements of a busy machine, as its report asks for


class Launches:
    """Starts workers on the ranks of a group: on this machine, or one on each of two hosts."""

    def __init__(self, group: str) -> None:
        self.group = group
        self.ranks = 2 if group in NETWORKS else int(group)

    @contextlib.contextmanager
    def open(self) -> Iterator[Launches]:
        """Create the hosts and their network where the group needs them."""
        if self.group not in NETWORKS:
            yield self
            return
        with open_hosts() as hosts:
            hosts.shape(float(self.group))
            self._hosts = hosts
            yield self

    def run(self, arguments: Sequence[str]) -> str:
        """Run ``python ARGUMENTS`` on all ranks; return what it printed, or end with its error."""
        if self.group in NETWORKS:
            done = self._hosts.run(arguments, _TIMEOUT)
        else:
            started = python_command(self.ranks, arguments)
            done = subprocess.run(started, env=environment(), capture_output=True, text=True, timeout=_TIMEOUT)
        if done.returncode:
            sys.exit(f"{' '.join(arguments[:4])} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
        return done.stdout


def hardware_file(folder: Path, group: str) -> Path:
    """Return the file of the machine that a group's ranks are on."""
    return folder / f"hardware-{group if group in NETWORKS else 'node'}.yaml"


def steps_file(folder: Path, framework: str, group: str) -> Path:
    """Return the file of the steps that a group's machine was fitted to."""
    return folder / f"steps-{framework}-{group}.json"


def threads_of(group: str) -> int:
    """Return the threads per rank: two hosts share the cores of this machine, which they can't see."""
    return max(1, (os.cpu_count() or 2) // 2) if group in NETWORKS else 0


def measure_machine(launches: Launches, framework: str, points: dict[str, Any], o: Namespace) -> None:
    """Measure the machine with the ranks of a group, unless the folder has it."""
    group, folder = launches.group, Path(o.folder)
    key, threads = f"{framework}/{group}/measured", threads_of(group)
    if key in points:
        return
    print(f"{framework}, {describe(group)}: plan --measure", flush=True)
    options = ["--framework", framework, "--hardware", str(hardware_file(folder, group))]
    options += ["--steps", str(steps_file(folder, framework, group))]
    options += ["--seconds", str(o.measure_seconds), "--rounds", str(o.measure_rounds)]
    options += ["--models", str(o.measure_models)]
    if threads:
        options += ["--train.threads", str(threads)]
    for _ in range(1 if o.short else _ATTEMPTS):
        points[key] = launches.run(["-m", "hvdlm", "plan", "--measure", *options]).splitlines()
        if not any(BUSY in line for line in points[key]):
            break
    store(points, folder)


def fit_machines(frameworks: Sequence[str], o: Namespace) -> None:
    """Fit the machines of all groups anew to the steps that were timed for them."""
    folder = Path(o.folder)
    for group in o.groups:
        hardware_file(folder, group).unlink(missing_ok=True)
    for group in o.groups:
        for framework in frameworks:
            if (steps := steps_file(folder, framework, group)).exists():
                fit_again(steps, hardware_file(folder, group))


def train(
    launches: Launches, framework: str, configurations: Mapping[str, Options], o: Namespace
) -> dict[str, list[float]]:
    """Return the seconds of a step of each configuration, turn by turn."""
    worker = [str(FOLDER / "planner_worker.py"), "--framework", framework, "--ranks", str(launches.ranks)]
    worker += ["--configurations", json.dumps(configurations), "--threads", str(threads_of(launches.group))]
    values = emitted(launches.run([*worker, "--rounds", str(o.rounds), "--seconds", str(o.seconds)]))
    return {name: [turn[name] for turn in values["seconds"]] for name in configurations}


def measure_group(launches: Launches, framework: str, points: dict[str, Any], o: Namespace) -> None:
    """Measure the machine and the group's configurations, unless the folder has them."""
    prefix = f"{framework}/{launches.group}"
    configurations = configurations_of(o)[launches.group]
    missing = {name: options for name, options in configurations.items() if f"{prefix}/{name}" not in points}
    if not missing:
        return
    measure_machine(launches, framework, points, o)
    print(f"{framework}, {describe(launches.group)}: {len(missing)} configurations", flush=True)
    for name, seconds in train(launches, framework, missing, o).items():
        points[f"{prefix}/{name}"] = {"seconds": seconds}
    store(points, Path(o.folder))


def points_of(o: Namespace) -> dict[str, Any]:
    """Return what the folder holds, which is created where it is missing."""
    folder = Path(o.folder)
    folder.mkdir(parents=True, exist_ok=True)
    stored = folder / "points.json"
    return json.loads(stored.read_text()) if stored.exists() else {}


def configurations_of(o: Namespace) -> dict[str, dict[str, Options]]:
    """Return the configurations by group."""
    return SHORT_GROUPS if o.short else TABLES[o.configurations]


def store(points: dict[str, Any], folder: Path) -> None:
    """Write what is measured so far."""
    replace(folder / "points.json", json.dumps(points, indent=1) + "\n")


def describe(group: str) -> str:
    """Return a group in words."""
    return f"2 hosts, {float(group) / 1e6:g} Mbit/s" if group in NETWORKS else f"{group} rank(s)"


def predict(framework: str, group: str, options: Options, folder: Path) -> StepTime:
    """Return the predicted step of a configuration, by the file of the group's machine."""
    config = make_config(options, framework, threads_of(group))
    manager = load_plugins(config)
    mesh = make_mesh(2 if group in NETWORKS else int(group), config.parallel)
    spec = plugins.find_model(manager, config.model.name)(config.model, vocabulary(options), config.data.context)
    hardware = read_hardware(hardware_file(folder, group))
    predicted = predict_time(config, spec, mesh, hardware, habits=habits_of(config))
    assert predicted is not None
    return predicted


def results(frameworks: Sequence[str], points: dict[str, Any], o: Namespace) -> list[dict[str, Any]]:
    """Return the predicted and measured seconds of all configurations."""
    rows = []
    for framework in frameworks:
        for group in o.groups:
            for name, options in configurations_of(o)[group].items():
                point = points.get(f"{framework}/{group}/{name}")
                if point is None:
                    continue
                predicted = predict(framework, group, options, Path(o.folder))
                measured = statistics.median(point["seconds"])
                error = 100 * (predicted.seconds / measured - 1)
                row = {"framework": framework, "group": group, "configuration": name, "measured": measured}
                rows.append(row | {"predicted": predicted.seconds, "error": error, "parts": vars(predicted)})
    return rows


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the table in Markdown."""
    yield "| framework | ranks | configuration | predicted, ms | measured, ms | error |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        yield (
            f"| {row['framework']} | {describe(row['group'])} | {row['configuration']} | {1e3 * row['predicted']:.1f} "
            f"| {1e3 * row['measured']:.1f} | {row['error']:+.1f}% |"
        )


def main() -> int:
    """Measure what is missing; report the errors; print the table and write it as JSON."""
    parser = make_parser(__doc__)
    parser.add_argument("--again", action="store_true", help="measure all anew")
    parser.add_argument("--fit", action="store_true", help="fit the machines anew to the steps that the folder holds")
    parser.add_argument("--configurations", choices=list(TABLES), default="first", help="the table; default: first")
    o = parse(parser, FULL, SHORT)
    check_known("--groups", o.groups, FIRST)
    folder = Path(o.folder)
    if o.again:
        shutil.rmtree(folder, ignore_errors=True)
    points = points_of(o)
    if o.fit:
        fit_machines(o.frameworks, o)
    for group in o.groups:
        try:
            with Launches(group).open() as launches:
                for framework in o.frameworks:
                    measure_group(launches, framework, points, o)
        except Missing as reason:
            print(f"{describe(group)} left out: {reason}", flush=True)
    rows = results(o.frameworks, points, o)
    replace(folder / "results.json", json.dumps(rows, indent=1) + "\n")
    print("", *table(rows), "", sep="\n")
    errors = [abs(row["error"]) for row in rows]
    details = f"{len(errors)} configurations, medians of {o.rounds} rounds"
    report("median error of predicted seconds a step, %", statistics.median(errors), MEDIAN, details)
    worst = max(rows, key=lambda row: abs(row["error"]))
    where = f"{worst['framework']}, {describe(worst['group'])}, {worst['configuration']}"
    report("worst error of predicted seconds a step, %", max(errors), WORST, where)
    return 0


if __name__ == "__main__":
    sys.exit(main())
