"""The simulator beside ranks that are threads, with injected delays that dominate their computation."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import hvdlm
from hvdlm import Config
from hvdlm.parallel.mesh import Mesh
from hvdlm.planning.hardware import Hardware, Link, MeasuredCollective, Rates
from hvdlm.planning.simulator_costs import StepCosts, step_costs
from hvdlm.planning.simulator_steps import step_ends
from hvdlm.training import loop
from hvdlm_planner.planned_run import plan_run

STEPS = 3
OPTIONS: Mapping[str, Any] = {
    **{"backend": "threads", "plugins": ["injected"], "model.layers": 2, "model.width": 16, "model.heads": 2},
    **{"data.tokenizer": "byte", "model.vocab": 256},
    **{"data.context": 16, "data.validation_share": 0.004},
    **{"train.steps": STEPS, "train.warmup": 0, "train.eval_every": 0},
    **{"train.replica_check_every": 0, "checkpoint.every": 0, "log.tensorboard": False, "log.progress": False},
}
LATENCY = 0.04  # seconds, within a node
ATTEMPTS = 3  # other work on the machine delays threads, too


def volume(operation: str, ranks: int) -> tuple[float, int]:
    """Return the transfers of a ring per byte, and its messages, as the injected links count them."""
    if operation == "all_reduce":
        return 2 * (ranks - 1) / ranks, 2 * (ranks - 1)
    return {"broadcast": 1.0}.get(operation, (ranks - 1) / ranks), ranks - 1


def machine(ranks_per_node: int, bandwidth: float) -> Hardware:
    """Return a machine that computes in no time: latency within nodes, bandwidth (bytes/s) between them."""
    curves = []
    for operation in ("all_reduce", "reduce_scatter", "all_gather", "broadcast"):
        for ranks in (2, 4, 8):
            wire, messages = volume(operation, ranks)
            near = (LATENCY * messages,) * 2
            curves.append(MeasuredCollective(operation, ranks, (1.0, 1e9), near))
            far = (wire / bandwidth, 1e9 * wire / bandwidth)
            curves.append(MeasuredCollective(operation, ranks, (1.0, 1e9), far, "network"))
    links = {"node": Link(LATENCY, 1e15), "network": Link(0.0, bandwidth)}
    rates = Rates(product_flops_per_second=1e18, memory_bytes_per_second=1e18)
    return Hardware("injected", "", "", (rates,), links, ranks_per_node=ranks_per_node, collectives=tuple(curves))


def measured(options: Mapping[str, Any], conditions: Any, ranks: int, folder: Path, patch: Any) -> float:
    """Return the seconds from the end of the first step to that of the last one, on the slowest rank."""
    ends = np.zeros((STEPS, ranks))
    do_step = loop.do_step

    def timed(run: Any, step: int, *rest: Any) -> Any:
        result = do_step(run, step, *rest)
        ends[step, run.world.rank] = time.perf_counter()
        return result

    file = folder / "conditions.yaml"
    file.write_text(yaml.safe_dump(conditions))
    with patch.context() as patched:
        patched.setattr(loop, "do_step", timed)
        options = {**OPTIONS, **options, "injected.file": str(file), "log.run": str(folder / "run")}
        hvdlm.train(Config.load(options), ranks=ranks)
    return float(ends[-1].max() - ends[0].max())


def simulated(costs: StepCosts, delays: np.ndarray) -> float:
    """Return the same of the simulator; ``delays``: what ranks sleep at the start of each step, ``[steps, ranks]``.

    Only updates take time, of which the one of a step stands for the sleep at the start of the next one.
    """
    stages = tuple(replace(s, forward=0.0, backward=0.0, last_backward=0.0, update=1.0) for s in costs.stages)
    sleeps = np.concatenate([delays[1:], np.zeros_like(delays[:1])]).reshape(STEPS, *costs.mesh.shape).max(axis=3)
    costs = replace(costs, stages=stages)
    ends = np.concatenate(list(step_ends(costs, [sleeps], STEPS)))
    (first,) = step_ends(costs, [np.zeros_like(sleeps[:1])], STEPS)
    return float(ends[-1].max() - first.max())


def planned(options: Mapping[str, Any], mesh: tuple[int, int, int], hardware: Hardware) -> StepCosts:
    axes = dict(zip(("parallel.data", "parallel.pipeline", "parallel.tensor"), mesh, strict=True))
    config = Config.load({**OPTIONS, **options, **axes, "plugins": []})
    run = plan_run(config, hardware)
    costs = step_costs(run.config, run.spec, Mesh(*mesh), hardware, run.moments)
    assert costs is not None
    return costs[0]


def check_seconds(
    options: Mapping[str, Any], mesh: tuple[int, int, int], bandwidth: float, slow: Any, tmp: Path, patch: Any
) -> None:
    data, pipeline, tensor = mesh
    copy, ranks = pipeline * tensor, data * pipeline * tensor
    costs = planned(options, mesh, machine(copy, bandwidth))
    delays = np.zeros((STEPS, ranks))
    for rule in slow:
        for step in range(rule.get("from_step", 1) - 1, rule.get("to_step", STEPS)):
            delays[step, rule["ranks"]] += rule["seconds"]
    expected = simulated(costs, delays)
    links = [{"between": "all", "bandwidth": f"{bandwidth:.0f} B/s"}]
    if copy > 1:
        groups = [list(range(d * copy, (d + 1) * copy)) for d in range(data)]
        links = [{"between": group, "latency": f"{1000 * LATENCY:g} ms"} for group in groups]
        pairs = [[r, r + copy] for r in range(ranks - copy)]
        links += [{"between": pair, "bandwidth": f"{bandwidth:.0f} B/s"} for pair in pairs]
    conditions = {"links": links, "slow": list(slow)}
    seconds: list[float] = []
    for attempt in range(ATTEMPTS):
        (tmp / str(attempt)).mkdir()
        seconds.append(measured(options, conditions, ranks, tmp / str(attempt), patch))
        if seconds[-1] == pytest.approx(expected, rel=0.05):
            return
    assert seconds[-1] == pytest.approx(expected, rel=0.05), seconds


def test_slow_ranks_and_links_delay_threads_as_simulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = [
        {"ranks": [1], "seconds": 0.2},
        {"ranks": [0, 5], "seconds": 0.5, "from_step": 2, "to_step": 2},
        {"ranks": [7], "seconds": 0.3, "from_step": 3},
    ]
    check_seconds({"train.batch_size": 8}, (8, 1, 1), 150e3, slow, tmp_path, monkeypatch)


def test_pipelines_and_tensor_ranks_wait_as_simulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"train.batch_size": 4, "train.micro_batch_size": 1, "parallel.pipeline": 2, "parallel.tensor": 2}
    # Of the second stage, which waits for the first one meanwhile: half of it costs time.
    slow = [{"ranks": [2], "seconds": 0.5, "from_step": 3}]
    check_seconds(options, (2, 2, 2), 40e3, slow, tmp_path, monkeypatch)
