"""Muon in layouts: matrices that tensor ranks shard or ZeRO cuts are orthogonalized whole, as on one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_layouts as layouts

from builders import parameters, save_checkpoint
from hvdlm.checkpoints.load import open_checkpoint, read_state
from hvdlm.parallel.mesh import Mesh
from hvdlm.protocols.world import World
from launching import FRAMEWORK, RANKS

MUON = {"optimizer": "muon", "learning_rate": 0.01, "momentum": 0.9}
GROUPS = {"embed.*": {"learning_rate_scale": 0.5, "weight_decay": 0.0}, "*.value": {"muon": False}}
LLAMA = {**layouts.LLAMA, "layers": 2}  # one key-value head, which all tensor ranks hold
CASES: list[tuple[tuple[int, int, int], int, dict[str, Any], dict[str, Any]]] = [
    ((2, 1, 1), 0, layouts.GPT, {}),
    ((2, 1, 1), 1, layouts.GPT, {"groups": GROUPS}),
    ((2, 1, 1), 2, layouts.GPT, {}),
    ((1, 1, 2), 0, layouts.GPT, {"groups": GROUPS}),
    ((1, 1, 2), 0, LLAMA, {}),
    ((1, 2, 1), 0, layouts.GPT, {}),
    ((1, 2, 1), 0, layouts.GPT, {"groups": {"layers.1.*": {"muon": False}}}),  # a stage without matrices
    ((4, 1, 1), 1, layouts.GPT, {}),
    ((2, 1, 2), 0, layouts.GPT, {}),
    ((2, 1, 2), 1, LLAMA, {"groups": {"embed.tokens": {"muon": True}}}),
    ((1, 2, 2), 0, layouts.GPT, {}),
    ((2, 2, 1), 1, layouts.GPT, {}),
]
if FRAMEWORK == "tensorflow":  # which traces each for seconds
    CASES = [CASES[1], CASES[4], CASES[8]]
CASES = [case for case in CASES if np.prod(case[0]) == RANKS]


def name_of(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else value["name"] if "name" in value else ""


@pytest.mark.parametrize("shape, zero, model, options", CASES)
def test_a_layout_follows_one_rank(
    world: World, shape: tuple[int, int, int], zero: int, model: dict[str, Any], options: dict[str, Any]
) -> None:
    mesh, all_options = Mesh(*shape), {"train": {**MUON, **options}, "parallel": {"zero": zero}}
    config = layouts.configured(mesh, model, **all_options)
    trainable = layouts.build(world, mesh, config)
    results = layouts.train_on_the_curve(world, mesh, trainable, model, **all_options)
    layouts.assert_traffic_is_predicted(world, mesh, config, results)
    layouts.assert_memory_is_predicted(world, mesh, config, trainable)


MOVES = {2: [((2, 1, 1), 1), ((1, 1, 2), 0)], 4: [((2, 1, 2), 1), ((4, 1, 1), 2), ((1, 2, 2), 0)]}


@pytest.mark.skipif(FRAMEWORK != "torch", reason="names and shards of the state are the core's")
def test_a_checkpoint_resumes_in_other_layouts(world: World, tmp_path_factory: pytest.TempPathFactory) -> None:
    (shape, zero), *others = MOVES[RANKS]
    folder = Path(world.broadcast_object(str(tmp_path_factory.mktemp("muon")) if world.rank == 0 else None))
    losses, _, _ = layouts.reference(world, layouts.GPT, train=MUON)
    mesh, half = Mesh(*shape), layouts.HALF
    config = layouts.configured(mesh, layouts.GPT, train=MUON, parallel={"zero": zero})
    first = layouts.build(world, mesh, config)
    layouts.train(first, mesh, world.rank, range(half), config)
    opened = open_checkpoint(save_checkpoint(folder, half, first.state(), {}, world, first.shards()))
    for other, stage in [(shape, zero), *others]:
        mesh = Mesh(*other)
        config = layouts.configured(mesh, layouts.GPT, train=MUON, parallel={"zero": stage})
        trainable = layouts.build(world, mesh, config)
        trainable.load_state(read_state(opened, trainable.shards(), world.rank, world.size))
        again = layouts.train(trainable, mesh, world.rank, range(half, layouts.STEPS), config)
        assert [r.loss for r in again] == pytest.approx(losses[half:], abs=layouts.TOLERANCE)


@pytest.mark.skipif(RANKS != 2, reason="two ranks show what four would")
def test_diloco_with_muon_inside(world: World) -> None:
    """MuLoCo (Therien et al. 2025): ranks differ between rounds, agree after one, and the loss falls."""
    mesh, communication = Mesh(2, 1, 1), {"exchange": "diloco"}
    config = layouts.configured(mesh, layouts.SHALLOW, train={**MUON, "steps": 8}, communication=communication)
    config.communication.local.steps = 4
    trainable = layouts.build(world, mesh, config)
    losses = []
    for first in (0, 4):
        results = layouts.train(trainable, mesh, world.rank, range(first, first + 3), config)
        momenta = {n: a.tolist() for n, a in trainable.state().items() if n.startswith("exchange/own/momentum/")}
        one, other = world.gather_objects(momenta)
        assert one and one != other
        results += layouts.train(trainable, mesh, world.rank, range(first + 3, first + 4), config)
        losses += [result.loss for result in results]
        one, other = world.gather_objects({name: array.tolist() for name, array in parameters(trainable).items()})
        assert one == other
    assert losses[-1] < losses[0] - 0.1
