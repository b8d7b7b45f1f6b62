"""The best layout by ``plan --search`` beside the best of all that are measured.

    python benchmarks/planner_search.py [torch tensorflow] [--folder runs/planner] [--groups 2 4 1e9 1e8] [--short]

A setting is a framework, a group of ranks (planner.py) and a model. The search names the fastest layout of every mesh;
these, and every mesh without ZeRO, in whole and in small micro-batches, train in turns. The figure is the number of
settings in which the first one takes at most 5% longer than the fastest of all. Measurements of the machine and of
layouts are kept in the folder, which may be that of planner.py.
"""

from __future__ import annotations

import statistics
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from harness import Bar, check_known, make_parser, parse, report
from hosts import Missing
from planner import Launches, describe, hardware_file, measure_machine, points_of, store, threads_of, train
from planner_configurations import SEARCHES, SHORT_SEARCHES, Options
from planner_worker import make_config

from hvdlm.config import Config
from hvdlm.planning.hardware import read_hardware
from hvdlm.planning.search import Layout, make_space, search
from hvdlm.planning.step_time import resolved
from hvdlm.training.run import load_plugins
from hvdlm_planner.layouts import layout_costs

CLOSE, SHARE = 1.05, Bar(at_least=0.8)
FULL = {"folder": "runs/planner", "groups": list(SEARCHES), "rounds": 9, "seconds": 0.4, "measure_seconds": 60.0}
FULL |= {"measure_rounds": 1000, "measure_models": 1000}
SHORT = {"groups": ["2"], "rounds": 2, "seconds": 0.02, "measure_seconds": 120.0, "measure_rounds": 1}
SHORT |= {"measure_models": 11}
# Of these, the search takes the given values: they don't change what a step computes, or little on CPUs.
FIXED = ("train.activation_checkpointing", "parallel.sequence", "communication.bucket_bytes")


def searched(config: Config, ranks: int, hardware: Path) -> list[Layout]:
    """Return the fastest layout of every mesh, the fastest first."""
    machine = read_hardware(hardware)
    config = resolved(config, machine)
    manager = load_plugins(config)
    costs = layout_costs(manager, config, machine, None)
    return search(config, make_space(config, costs.spec, ranks, FIXED), costs, count=20, limited=False)


def candidates(options: Options, layouts: list[Layout]) -> dict[str, Options]:
    """Return the layouts to measure by name: those of the search, its first one first, and plain ones."""
    chosen = [{**options, **_options(layout)} for layout in layouts]
    for layout in layouts:
        mesh, rows = layout.mesh, options["train.batch_size"] // layout.mesh.data
        plain = {"parallel.data": mesh.data, "parallel.pipeline": mesh.pipeline, "parallel.tensor": mesh.tensor}
        for size in (rows, max(1, rows // 4)):
            chosen.append({**options, **plain, "train.micro_batch_size": size})
    return {_name(one): one for one in chosen}


def _options(layout: Layout) -> Options:
    mesh = layout.mesh
    shape = {"parallel.data": mesh.data, "parallel.pipeline": mesh.pipeline, "parallel.tensor": mesh.tensor}
    return {**{name: value for name, value in layout.options.items() if name not in FIXED}, **shape}


def _name(options: Options) -> str:
    shape = "x".join(str(options[f"parallel.{axis}"]) for axis in ("data", "pipeline", "tensor"))
    rows = options["train.micro_batch_size"] or options["train.batch_size"] // options["parallel.data"]
    return f"{shape}, ZeRO-{options.get('parallel.zero', 0)}, micro-batch {rows}"


def setting(launches: Launches, framework: str, name: str, points: dict[str, Any], o: Namespace) -> float:
    """Return the measured seconds of the search's first layout, divided by those of the fastest measured one."""
    group, folder = launches.group, Path(o.folder)
    measure_machine(launches, framework, points, o)
    options = (SHORT_SEARCHES if o.short else SEARCHES)[group][name]
    config = make_config(options, framework, threads_of(group))
    layouts = searched(config, launches.ranks, hardware_file(folder, group))
    measured = candidates(options, layouts)
    key = f"search/{framework}/{group}/{name}"
    stored = points.setdefault(key, {})
    if missing := {label: one for label, one in measured.items() if label not in stored}:
        for label, seconds in train(launches, framework, missing, o).items():
            stored[label] = {"seconds": seconds}
        store(points, folder)
    seconds = {label: statistics.median(stored[label]["seconds"]) for label in measured}
    first, best = next(iter(measured)), min(seconds, key=lambda label: seconds[label])
    ratio = seconds[first] / seconds[best]
    print(
        f"{framework}, {describe(group)}, {name}: {first}, {1e3 * seconds[first]:.1f} ms; the best of {len(seconds)} "
        f"measured: {best}, {1e3 * seconds[best]:.1f} ms; ratio {ratio:.3f}",
        flush=True,
    )
    return ratio


def main() -> int:
    """Measure all settings; report in how many the search is right."""
    o = parse(make_parser(__doc__), FULL, SHORT)
    check_known("--groups", o.groups, SEARCHES)
    points, ratios = points_of(o), []
    for group in o.groups:
        try:
            with Launches(group).open() as launches:
                for framework in o.frameworks:
                    for name in (SHORT_SEARCHES if o.short else SEARCHES)[group]:
                        ratios.append(setting(launches, framework, name, points, o))
        except Missing as reason:
            print(f"{describe(group)} left out: {reason}", flush=True)
    close = sum(ratio <= CLOSE for ratio in ratios)
    details = f"{close} of {len(ratios)} settings; largest ratio {max(ratios):.3f}"
    report("settings in which the search's layout is within 5% of the best", close / len(ratios), SHARE, details)
    return 0


if __name__ == "__main__":
    sys.exit(main())
