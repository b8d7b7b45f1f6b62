"""A pipeline stage starts its buckets after its last backward pass, whatever other stages still compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from test_layouts import GPT, build, configured, train

from hvdlm.parallel.mesh import Mesh
from hvdlm.protocols.world import World
from launching import BACKEND, FRAMEWORK, RANKS

MESH = Mesh(2, 2, 1)

pytestmark = pytest.mark.skipif(
    RANKS != 4 or BACKEND != "threads" or FRAMEWORK not in ("torch", "tensorflow"),
    reason="stages of two data ranks, on any transport alike",
)


def recorded(events: list[str], label: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function``, whose calls are added to ``events``, with their argument ``name`` if they have one."""

    def call(*arguments: Any) -> Any:
        events.append(" ".join([label, *(a for a in arguments if isinstance(a, str))]))
        return function(*arguments)

    return call


def first_step(world: World, zero: int, schedule: str, virtual: int = 1) -> list[str]:
    """Return what this rank does in the first step, in which TensorFlow traces its graphs."""
    events: list[str] = []
    model = {**GPT, "layers": 2 * virtual}
    config = configured(MESH, model, parallel={"zero": zero, "schedule": schedule, "virtual_stages": virtual})
    data, stages = (world.group(MESH.group(axis, world.rank)) for axis in ("data", "pipeline"))
    trainable = build(world, MESH, config)
    data.all_reduce_async = recorded(events, "bucket", data.all_reduce_async)
    data.reduce_scatter_async = recorded(events, "bucket", data.reduce_scatter_async)
    stages.broadcast_async = recorded(events, "message", stages.broadcast_async)
    trainable._pipeline.flush = recorded(events, "flush", trainable._pipeline.flush)
    train(trainable, MESH, world.rank, range(1), config)
    return events


SCHEDULES = [("1f1b", 1), ("gpipe", 1), ("1f1b", 2)] if FRAMEWORK == "torch" else [("1f1b", 1)]


@pytest.mark.parametrize("schedule, virtual", SCHEDULES)
def test_buckets_start_before_the_last_message_arrived(world: World, schedule: str, virtual: int) -> None:
    events = first_step(world, 0, schedule, virtual)
    buckets = [index for index, event in enumerate(events) if event.startswith("bucket gradients")]
    assert len(buckets) > 1 and buckets[-1] < events.index("flush")
    if FRAMEWORK == "torch":  # during the last backward pass, whose result is the message
        last = max(index for index, event in enumerate(events) if event.startswith("message pipeline.backward"))
        assert MESH.coordinates(world.rank)["pipeline"] == 0 or buckets[0] < last


@pytest.mark.skipif(FRAMEWORK == "torch", reason="the hooks of a backward pass start buckets before it has a result")
def test_a_stage_sends_gradients_before_it_scatters_its_own(world: World) -> None:
    events = first_step(world, 2, "1f1b")
    scattered = next(index for index, event in enumerate(events) if event.startswith("bucket"))
    assert events.index("message pipeline.backward.0") < scattered
