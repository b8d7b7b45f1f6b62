"""The moving average of the weights in layouts: that of one rank, gathered for evaluations, in any checkpoint."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_layouts as layouts

from builders import save_checkpoint, take_shard
from hvdlm.checkpoints.load import averaged, open_checkpoint, read_state
from hvdlm.communication.traffic import by_axis, grown
from hvdlm.parallel.mesh import Mesh
from hvdlm.protocols.world import World
from launching import FRAMEWORK, RANKS

EMA = {"ema": 0.7}
MUON = {"optimizer": "muon", "learning_rate": 0.01}
CASES: list[tuple[tuple[int, int, int], dict[str, Any], dict[str, Any]]] = [
    ((2, 1, 1), {}, {}),
    ((2, 1, 1), {"zero": 1}, MUON),
    ((2, 1, 1), {"zero": 2}, {}),
    ((2, 1, 1), {"zero": 1, "zero_gather": "bf16"}, {}),
    ((2, 1, 1), {"zero": 2, "zero_gather": "int8"}, {}),
    ((2, 1, 1), {"zero": 3}, {}),
    ((1, 1, 2), {"sequence": True}, {}),
    ((1, 2, 1), {}, {}),
    ((2, 1, 2), {"zero": 1}, {}),
    ((2, 2, 1), {"zero": 2}, {}),
    ((1, 2, 2), {}, MUON),
]
if FRAMEWORK == "tensorflow":  # which traces each for seconds
    CASES = [CASES[1], CASES[3], CASES[5], CASES[7], CASES[8]]
CASES = [case for case in CASES if np.prod(case[0]) == RANKS]


_ALONE: dict[str, Any] = {}  # of rank 0: one rank's trainable after ``STEPS`` steps, and its average, by settings


def of_one_rank(model: dict[str, Any], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return a trainable of one rank, which has been trained, and the average of its weights then, by name."""
    key = repr((sorted(model.items()), options))
    if key not in _ALONE:
        alone = layouts.unsharded(layouts.configured(Mesh(1, 1, 1), model, train={**EMA, **options}))
        layouts.train(alone, Mesh(1, 1, 1), 0, range(layouts.STEPS), alone._config)
        averages = {name: a.tolist() for name, a in alone.state().items() if name.startswith("optimizer/ema/")}
        _ALONE[key] = alone, averages
    return _ALONE[key]


def name_of(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else "-".join(f"{k}{v}" for k, v in value.items())


@pytest.mark.parametrize("shape, parallel, options", CASES, ids=name_of)
def test_a_layout_averages_as_one_rank(
    world: World,
    shape: tuple[int, int, int],
    parallel: dict[str, Any],
    options: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    mesh, model = Mesh(*shape), {**layouts.GPT, "layers": max(shape[1], layouts.FEWEST_LAYERS)}
    config = layouts.configured(mesh, model, parallel=parallel, train={**EMA, **options})
    trainable = layouts.build(world, mesh, config)
    results = layouts.train(trainable, mesh, world.rank, range(layouts.STEPS), config)
    layouts.assert_traffic_is_predicted(world, mesh, config, results)
    layouts.assert_memory_is_predicted(world, mesh, config, trainable)
    alone, averages = of_one_rank(model, options) if world.rank == 0 else (None, None)
    expected = {name: np.array(values, np.float32) for name, values in world.broadcast_object(averages).items()}
    state, shards = trainable.state(), trainable.shards()
    names = [name for name in state if name.startswith("optimizer/ema/")]
    rounded = parallel.get("zero_gather") is not None  # ranks compute with other parameters than one rank
    for name in names:
        np.testing.assert_allclose(
            state[name], take_shard(expected[name], shards[name]), rtol=0, atol=2e-2 if rounded else 1e-4, err_msg=name
        )
    assert {name for of_rank in world.gather_objects(names) for name in of_rank} == expected.keys()
    # Ranks with the same identity hold the same.
    identities = trainable.replicas(names)
    own = [[name, identities[name], zlib.crc32(state[name].tobytes())] for name in names]
    checksums: dict[tuple[str, str], set[int]] = {}
    for name, identity, checksum in (one for of_rank in world.gather_objects(own) for one in of_rank):
        checksums.setdefault((name, identity), set()).add(checksum)
    assert all(len(equal) == 1 for equal in checksums.values())
    assert_evaluation_is_that_of_the_average(world, mesh, trainable, config, alone, tmp_path_factory)


def assert_evaluation_is_that_of_the_average(
    world: World, mesh: Mesh, trainable: Any, config: Any, alone: Any, folders: pytest.TempPathFactory
) -> None:
    """Evaluate the average, and once more from a checkpoint on one rank; ZeRO's evaluation gathers it unrounded."""
    batch = layouts.learnable_batch(99)
    folder = Path(world.broadcast_object(str(folders.mktemp("average")) if world.rank == 0 else None))
    opened = averaged(open_checkpoint(save_checkpoint(folder, 8, trainable.state(), {}, world, trainable.shards())))
    before = by_axis(trainable.traffic())
    trainable.show_average(True)
    sent = grown(by_axis(trainable.traffic()), before)
    shard = trainable._average.vector.shape[0]
    # ZeRO-3 gathers its layers as they are used.
    assert sent == ({"data": 4 * int(shard)} if config.parallel.zero in (1, 2) else {})
    loss, _ = trainable.eval_step(batch)
    trainable.show_average(False)
    own, _ = trainable.eval_step(batch)
    expected = None
    if world.rank == 0:
        wanted = {name: box for name, box in alone.shards().items() if name.startswith("parameters/")}
        alone.load_state(read_state(opened, wanted, 0, 1))
        expected, _ = alone.eval_step(batch)
    expected = world.broadcast_object(expected)
    if mesh.coordinates(world.rank)["pipeline"] == mesh.pipeline - 1:
        assert loss == pytest.approx(expected, rel=1e-5) and loss != own
    after = layouts.train(trainable, mesh, world.rank, range(8, 9), config)
    layouts.assert_traffic_is_predicted(world, mesh, config, after)


@pytest.mark.skipif(RANKS != 4 or FRAMEWORK != "torch", reason="names and shards of the state are the core's")
def test_a_checkpoint_resumes_in_other_layouts(world: World, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = Path(world.broadcast_object(str(tmp_path_factory.mktemp("average")) if world.rank == 0 else None))
    mesh = Mesh(2, 1, 2)
    config = layouts.configured(mesh, layouts.GPT, train=EMA, parallel={"zero": 1})
    first = layouts.build(world, mesh, config)
    layouts.train(first, mesh, world.rank, range(layouts.HALF), config)
    opened = open_checkpoint(save_checkpoint(folder, layouts.HALF, first.state(), {}, world, first.shards()))
    alone = layouts.unsharded(layouts.configured(Mesh(1, 1, 1), layouts.GPT, train=EMA))
    alone.load_state(read_state(opened, alone.shards(), 0, 1))
    layouts.train(alone, Mesh(1, 1, 1), 0, range(layouts.HALF, layouts.STEPS), alone._config)
    expected = alone.state()
    for other, zero in [((4, 1, 1), 2), ((1, 2, 2), 0)]:
        mesh = Mesh(*other)
        config = layouts.configured(mesh, layouts.GPT, train=EMA, parallel={"zero": zero})
        trainable = layouts.build(world, mesh, config)
        trainable.load_state(read_state(opened, trainable.shards(), world.rank, world.size))
        layouts.train(trainable, mesh, world.rank, range(layouts.HALF, layouts.STEPS), config)
        state, shards = trainable.state(), trainable.shards()
        for name in (name for name in state if name.startswith("optimizer/ema/")):
            wanted = take_shard(expected[name], shards[name])
            np.testing.assert_allclose(state[name], wanted, rtol=0, atol=1e-4, err_msg=name)
