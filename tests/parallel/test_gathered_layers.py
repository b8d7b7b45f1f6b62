"""ZeRO-3: parameters that are gathered layer by layer train as whole ones do, in the memory of a shard and two layers."""

from __future__ import annotations

from typing import Any

import pytest

import test_layouts as layouts
from hvdlm.parallel.layer_units import units_of
from hvdlm.parallel.mesh import Mesh
from hvdlm.protocols.world import World
from launching import RANKS
from test_layouts import GPT, LLAMA, build, configured, train

ZERO = {"parallel": {"zero": 3}}
MESH = Mesh(RANKS, 1, 1)
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gpt": (GPT, {"train": {"steps": 50}}),
    "biases": ({**GPT, "bias": True}, {"train": layouts.SGD}),
    "untied": ({**GPT, "tie_embeddings": False}, {}),
    "llama": (LLAMA, {"train": {"micro_batch_size": None}}),
    "recomputed": (GPT, {"train": {"activation_checkpointing": True}}),
}


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_norms_follow_one_rank(world: World, name: str) -> None:
    model, options = MODELS[name]
    config = configured(MESH, model, **options, **ZERO)
    trainable = build(world, MESH, config)
    results = layouts.train_on_the_curve(world, MESH, trainable, model, **options, **ZERO)
    layouts.assert_traffic_is_predicted(world, MESH, config, results)
    held, expected = trainable.memory(), layouts._predicted(world, MESH, config).memory
    assert held["optimizer"] == expected["optimizer"]
    for kind in ("parameters", "gradients"):  # the order in which biases get their gradients is not predicted
        assert held[kind] == pytest.approx(expected[kind], rel=0.01 if model.get("bias") else 0), kind


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


@pytest.mark.parametrize("name", SIZES)
def test_memory_of_a_rank_is_a_shard_and_two_layers(world: World, name: str) -> None:
    model, vocab = SIZES[name]
    config = configured(MESH, {"name": "gpt", "heads": 4, **model}, **ZERO)
    trainable = build(world, MESH, config, vocab)
    compared = compare_storages(trainable)
    train(trainable, MESH, world.rank, range(2), config)
    assert len(compared) > 8 and all(counted == held for counted, held in compared)
    memory = trainable.memory()
    assert sum(memory[kind] for kind in ("parameters", "gradients", "optimizer")) <= bound(trainable.layout, 2)
    assert trainable._layers.held.now == 0 and storage_bytes(trainable) == 0  # all is freed between steps


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
