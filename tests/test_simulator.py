"""The simulator of many ranks against an event-by-event simulation, closed forms and real ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from event_simulation import World
from hvdlm.parallel.mesh import Mesh
from hvdlm.parallel.pipeline_schedules import idle_share
from hvdlm.planning.simulator import Disturbances, run, simulate
from hvdlm.planning.simulator_steps import Bucket, StageCosts, StepCosts, step_ends

MESHES = [(1, 1, 1), (8, 1, 1), (1, 4, 1), (1, 1, 3), (2, 2, 2), (3, 2, 1), (4, 3, 2), (2, 4, 4), (4, 4, 4), (64, 1, 1)]


def random_costs(draw: np.random.Generator, shape: tuple[int, int, int], exchange: str) -> StepCosts:
    """Return random costs; some collectives take no time, others longer than the passes."""
    data, pipeline, tensor = shape

    def seconds(most: float) -> float:
        return float(draw.uniform(0, most)) * bool(draw.random() < 0.8)

    def stage() -> StageCosts:
        ready = np.sort(draw.random(draw.integers(0, 6)))
        buckets = tuple(Bucket(float(at), seconds(1.0)) for at in ready) if data > 1 else ()
        collectives = (seconds(0.3), seconds(0.3)) if tensor > 1 else (0.0, 0.0)
        gather = seconds(0.5) if exchange.startswith("zero") and data > 1 else 0.0
        return StageCosts(seconds(1), 0.1 + seconds(2), *collectives, buckets, seconds(0.5), gather, seconds(2))

    few = {name: seconds(0.2) for name in ("data", "message", "metrics", "norm")}
    return StepCosts(
        Mesh(*shape),
        tuple(stage() for _ in range(pipeline)),
        int(draw.integers(1, 6)),
        str(draw.choice(["1f1b", "gpipe"])),
        **few,
        tied=seconds(0.2) if pipeline > 1 else 0.0,
        vote=seconds(float(draw.choice([0.1, 30.0]))),
        every=3 if exchange == "local" else 1,
        warmup=int(draw.integers(0, 3)) if exchange == "local" else 0,
        every_micro_batch=exchange == "zero2",
    )


@pytest.mark.parametrize("exchange", ["all_reduce", "zero1", "zero2", "local"])
def test_ranks_end_steps_when_the_events_say(exchange: str) -> None:
    draw = np.random.default_rng(len(exchange))
    for number in range(40):
        shape = MESHES[number % len(MESHES)]
        costs, steps = random_costs(draw, shape, exchange), 7
        slowness = draw.lognormal(0, draw.choice([0, 0.3]), (steps, *shape))
        expected = World(costs, slowness).simulate().max(axis=3)
        slowest = slowness.max(axis=3)
        blocks = [slowest[:1], slowest[1:5], slowest[5:]]
        ends = np.concatenate(list(step_ends(costs, blocks, steps)))
        np.testing.assert_allclose(ends, expected, rtol=1e-12, atol=1e-12, err_msg=f"{number}: {costs}")
