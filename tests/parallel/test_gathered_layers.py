"""ZeRO-3: parameters that are gathered layer by layer train as whole ones do, in the memory of a shard and two layers."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import test_layouts as layouts
from hvdlm.parallel.layer_units import units_of
from hvdlm.parallel.mesh import Mesh
from hvdlm.protocols.world import World
from launching import BACKEND, FRAMEWORK, RANKS
from test_layouts import GPT, LLAMA, build, configured, train

ZERO = {"parallel": {"zero": 3}}
MESH = Mesh(RANKS, 1, 1)
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gpt": (GPT, {"train": {"steps": 50}}),
    "biases": ({**GPT, "bias": True}, {"train": layouts.SGD}),
    "untied": ({**GPT, "tie_embeddings": False}, {}),
    "llama": (LLAMA, {"train": {"micro_batch_size": None}}),
    "recomputed": ({**GPT, "dropout": 0.0}, {"train": {"activation_checkpointing": True}}),
}


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_norms_follow_one_rank(world: World, name: str) -> None:
    model, options = MODELS[name]
    layouts.assert_follows_one_rank(world, MESH, model, **options, **ZERO)


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
    train(trainable, MESH, world.rank, range(2), config)
    memory = trainable.memory()
    held = sum(memory[kind] for kind in ("parameters", "gradients", "optimizer"))
    print(name, memory, held, bound(trainable.layout, 2))
    assert held <= bound(trainable.layout, 2)
