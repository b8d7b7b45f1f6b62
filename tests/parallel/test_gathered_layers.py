"""ZeRO-3: parameters gathered layer by layer train as whole ones do, in the memory of a shard and two layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_layouts as layouts
from test_layouts import GPT, HALF, LLAMA, STEPS, TOLERANCE, build, configured, train

from hvdlm.checkpoints.load import open_checkpoint, read_state
from hvdlm.config import Config
from hvdlm.parallel.layer_units import units_of
from hvdlm.parallel.mesh import Mesh
from hvdlm.protocols.world import World
from launching import BACKEND, FRAMEWORK, RANKS

ZERO = {"parallel": {"zero": 3}}
MESH = Mesh(RANKS, 1, 1)
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # The curve that docs/parallelism.md promises, in the launch of each framework that runs all of these tests.
    "gpt": (GPT, {"train": {"steps": 50 if FRAMEWORK == "tensorflow" or BACKEND == "threads" else STEPS}}),
    "biases": ({**GPT, "bias": True}, {"train": layouts.SGD}),
    "untied": ({**GPT, "tie_embeddings": False}, {}),
    "llama": (LLAMA, {"train": {"micro_batch_size": None}}),
    "recomputed": (GPT, {"train": {"activation_checkpointing": True}}),
}
# TensorFlow traces a graph of the last micro-batch for seconds, and one of those before it: the case gpt has both.
ONE_GRAPH: dict[str, Any] = {"micro_batch_size": None}
TRAIN = ONE_GRAPH if FRAMEWORK == "tensorflow" else {}
if FRAMEWORK == "tensorflow":
    MODELS = {"gpt": MODELS["gpt"], "recomputed": (GPT, {"train": {"activation_checkpointing": True, **ONE_GRAPH}})}


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_norms_follow_one_rank(world: World, name: str) -> None:
    model, options = MODELS[name]
    config = configured(MESH, model, **options, **ZERO)
    trainable = build(world, MESH, config)
    results = layouts.train_on_the_curve(world, MESH, trainable, model, **options, **ZERO)
    layouts.assert_traffic_is_predicted(world, MESH, config, results)
    held, expected = trainable.memory(), layouts._predicted(world, MESH, config).memory
    if FRAMEWORK == "torch":  # whose activations the plan knows exactly
        assert held["activations"] == pytest.approx(expected["activations"], rel=0.02)
    assert held["optimizer"] == expected["optimizer"]
    for kind in ("parameters", "gradients"):  # the order in which biases get their gradients is not predicted
        assert held[kind] == pytest.approx(expected[kind], rel=0.01 if model.get("bias") else 0), kind


TENSOR: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "tensor": (GPT, {}, {}),
    "sequence": ({**GPT, "bias": True, "tie_embeddings": False}, {"train": layouts.SGD}, {"sequence": True}),
    "qwen3": (layouts.QWEN3, {"train": {"micro_batch_size": None}}, {}),
    "recomputed": (layouts.NEOX, {"train": {**layouts.SGD, **layouts.RECOMPUTING}}, {"sequence": True}),
}


@pytest.mark.skipif(RANKS != 4 or FRAMEWORK != "torch", reason="data and tensor ranks, which TensorFlow refuses")
@pytest.mark.parametrize("name", TENSOR)
def test_tensor_ranks_gather_their_shards_of_layers(world: World, name: str) -> None:
    model, train_options, parallel = TENSOR[name]
    mesh, options = Mesh(2, 1, 2), {**train_options, "parallel": {"zero": 3, **parallel}}
    results = layouts.assert_follows_one_rank(world, mesh, model, **options)
    layouts.assert_traffic_is_predicted(world, mesh, configured(mesh, model, **options), results)


def moved_state(world: World, trainable: Any, folders: pytest.TempPathFactory) -> Any:
    """Return a checkpoint of ``trainable`` after ``HALF`` steps, opened."""
    return open_checkpoint(Path(layouts.write_checkpoint(world, trainable, folders)))


def continued(world: World, mesh: Mesh, trainable: Any, checkpoint: Any, config: Config) -> list[float]:
    """Return the losses after ``HALF`` steps."""
    trainable.load_state(read_state(checkpoint, trainable.shards(), world.rank, world.size))
    return [result.loss for result in train(trainable, mesh, world.rank, range(HALF, STEPS), config)]


OTHERS = [(MESH, 0), (MESH, 2), (Mesh(RANKS // 2, 1, 2), 1), (Mesh(RANKS // 2, 2, 1), 0)]
OTHERS = OTHERS if FRAMEWORK == "torch" else OTHERS[2:3]


def test_checkpoints_move_from_and_to_other_layouts(world: World, tmp_path_factory: pytest.TempPathFactory) -> None:
    losses, _, _ = layouts.reference(world, GPT)
    config = configured(MESH, GPT, train=TRAIN, **ZERO)
    trainable, resumed = build(world, MESH, config), build(world, MESH, config)
    train(trainable, MESH, world.rank, range(HALF), config)
    checkpoint = moved_state(world, trainable, tmp_path_factory)
    saved = sum(array.size for name, array in trainable.state().items() if name.startswith("parameters/"))
    assert saved <= trainable.layout.size // RANKS
    uninterrupted = [result.loss for result in train(trainable, MESH, world.rank, range(HALF, STEPS), config)]
    assert continued(world, MESH, resumed, checkpoint, config) == uninterrupted  # bit for bit
    for mesh, zero in OTHERS:
        other = configured(mesh, GPT, train=TRAIN, parallel={"zero": zero if mesh.data > 1 else 0})
        trainable = build(world, mesh, other)
        initial = trainable.state()
        assert continued(world, mesh, trainable, checkpoint, other) == pytest.approx(losses[HALF:], abs=TOLERANCE)
        trainable.load_state(initial)
        train(trainable, mesh, world.rank, range(HALF), other)
        back = moved_state(world, trainable, tmp_path_factory)
        again = continued(world, MESH, resumed, back, config)
        assert again == pytest.approx(losses[HALF:], abs=TOLERANCE)


UNTIED = {**GPT, "tie_embeddings": False, "bias": True}


@pytest.mark.parametrize("model", [GPT, UNTIED] if FRAMEWORK == "torch" else [UNTIED])
def test_evaluation_and_generation_gather_layer_by_layer(world: World, model: dict[str, Any]) -> None:
    config = configured(MESH, model, train=TRAIN, **ZERO)
    trainable, rows = build(world, MESH, config), layouts.learnable_batch(3)
    alone = layouts.unsharded(configured(Mesh(1, 1, 1), model)) if world.rank == 0 else None

    def scores(of: Any) -> list[Any]:
        loss, _ = of.eval_step(rows)
        first, cache = of.logits(rows.inputs[:2, :3], None)
        second, _ = of.logits(rows.inputs[:2, 3:4], cache)
        return [loss, first.tolist(), second.tolist()]

    before = scores(trainable)
    train(trainable, MESH, world.rank, range(2), config)
    after, again = scores(trainable), scores(trainable)
    assert after == again and after[0] < before[0]  # of the parameters as they are now
    expected = world.broadcast_object(scores(alone) if alone else None)
    for value, one in zip(before, expected, strict=True):
        np.testing.assert_allclose(value, one, rtol=1e-4, atol=1e-5)


def test_bf16_and_dropout_are_those_of_whole_parameters(world: World) -> None:
    """Rank for rank: ZeRO-2 rounds and draws alike, and its sums differ in the last bits."""
    model, options = {**GPT, "dropout": 0.1}, {"train": {**TRAIN, "precision": "bf16"}}
    losses = []
    for zero in (2, 3):
        config = configured(MESH, model, parallel={"zero": zero}, **options)
        results = train(build(world, MESH, config), MESH, world.rank, range(STEPS), config)
        losses.append([result.loss for result in results])
    assert losses[1][0] == losses[0][0] and losses[1] == pytest.approx(losses[0], abs=2e-3)
    assert losses[1][-1] < losses[1][0] - 0.1


SIZES = {
    "deep": ({"layers": 8, "width": 32}, 64),
    "wide": ({"layers": 3, "width": 64, "tie_embeddings": False}, 64),
    "vocabulary": ({"layers": 2, "width": 32}, 1000),
    "untied-vocabulary": ({"layers": 2, "width": 32, "tie_embeddings": False, "positions": "rotary"}, 1000),
}


def bound(layout: Any, vectors: int) -> float:
    """Return the bytes that parameters, gradients and ``vectors`` of state may take on one of ``RANKS`` ranks."""
    sizes = sorted(4 * unit.size for unit in units_of(layout))
    return 1.1 / RANKS * 4 * (2 + vectors) * layout.size + sum(sizes[-2:]) + sizes[-1]


@pytest.mark.parametrize("name", SIZES if FRAMEWORK == "torch" else ["vocabulary"])
def test_memory_of_a_rank_is_a_shard_and_two_layers(world: World, name: str) -> None:
    model, vocab = SIZES[name]
    config = configured(MESH, {"name": "gpt", "heads": 4, **model}, **ZERO)
    trainable = build(world, MESH, config, vocab)
    compared = compare_storages(trainable) if FRAMEWORK == "torch" else []
    train(trainable, MESH, world.rank, range(2), config)
    memory = trainable.memory()
    assert sum(memory[kind] for kind in ("parameters", "gradients", "optimizer")) <= bound(trainable.layout, 2)
    if FRAMEWORK == "torch":
        assert len(compared) > 8 and all(counted == held for counted, held in compared)
        assert trainable._layers.held.now == 0 and storage_bytes(trainable) == 0  # all is freed between steps


@pytest.mark.skipif(FRAMEWORK != "tensorflow", reason="what a graph keeps")
@pytest.mark.parametrize("again", [False, True], ids=["products", "recomputed"])
def test_a_graph_keeps_no_weights_for_its_backward_pass(
    world: World, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But those of the last layer and the head, whose backward passes come next, and vectors of a few percent."""
    from hvdlm_tensorflow import memory

    model = {**GPT, "layers": 4}
    config = configured(MESH, model, train={"micro_batch_size": None, "activation_checkpointing": again}, **ZERO)
    kept = []
    for scope in (memory.SCOPE, "of no operation"):
        monkeypatch.setattr(memory, "SCOPE", scope)
        trainable = build(world, MESH, config)
        train(trainable, MESH, world.rank, range(1), config)
        kept.append(trainable.memory()["activations"])
    sizes = {unit.name: 4 * unit.size for unit in units_of(trainable.layout)}
    stays = sizes["layers.3"] + sizes["embed"] + sizes["head"]
    assert 0.5 * stays < kept[1] - kept[0] < 1.1 * stays


def storage_bytes(trainable: Any) -> int:
    """Return the bytes that the memory of parameters and of their gradients takes."""
    layers = trainable._layers
    leaves = [*layers.parameters.values(), *([layers.tied] if layers.tied is not None else [])]
    tensors = [tensor for leaf in leaves for tensor in (leaf, leaf.grad) if tensor is not None]
    return sum({s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}.values())


def compare_storages(trainable: Any) -> list[tuple[int, int]]:
    """Return a list to which every start of a sum adds the bytes that are counted, and those that PyTorch holds."""
    exchange, layers, gradients, compared = trainable._exchange, trainable._layers, trainable._gradients, []
    start = exchange.start

    def compare(bucket: Any, index: int) -> Any:
        travelling = sum(4 * unit._size for unit in layers._units.values() if unit._handles)
        sums = bucket.nbytes + sum(gradients._bytes[number] for number in gradients._handles)
        held = storage_bytes(trainable) + travelling + sums + sums // RANKS
        compared.append((layers.held.now, held))
        return start(bucket, index)

    exchange.start = compare
    return compared
