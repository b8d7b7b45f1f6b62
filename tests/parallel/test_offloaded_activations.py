"""Activations on the host in layouts of several ranks: the curve of one rank, and two layers on the device."""

from __future__ import annotations

from typing import Any

import pytest
from test_layouts import DEEP, GPT, _predicted, build, configured, train_on_the_curve

from builders import case
from hvdlm.parallel.mesh import Mesh
from hvdlm.protocols.world import World
from launching import FRAMEWORK, RANKS

pytestmark = pytest.mark.skipif(FRAMEWORK != "torch", reason="TensorFlow's graphs have no hooks for what they keep")

OFFLOAD = {"activation_offload": True}
AGAIN = {**OFFLOAD, "activation_checkpointing": True}
VIRTUAL = {**GPT, "layers": 8}
CASES: list[tuple[str, tuple[int, int, int], dict[str, Any], dict[str, Any]]] = [
    ("1f1b", (1, 2, RANKS // 2), VIRTUAL, {}),
    ("gpipe", (RANKS // 2, 2, 1), VIRTUAL, {"parallel": {"schedule": "gpipe"}}),
    ("virtual", (1, RANKS, 1), VIRTUAL, {"parallel": {"virtual_stages": 2}}),
    ("sequence", (1, 1, RANKS), DEEP, {"parallel": {"sequence": True}}),
    ("zero3", (RANKS, 1, 1), DEEP, {"parallel": {"zero": 3}}),
    ("recomputed", (RANKS // 2, 1, 2), DEEP, {"train": AGAIN}),
]


@pytest.mark.parametrize("name, shape, model, options", [case(*one, id=one[0]) for one in CASES])
def test_layouts_with_an_offload_follow_the_curve_of_one_rank(
    world: World, name: str, shape: tuple[int, int, int], model: dict[str, Any], options: dict[str, Any]
) -> None:
    mesh, options = Mesh(*shape), {"train": OFFLOAD, **options}
    config = configured(mesh, model, **options)
    trainable = build(world, mesh, config)
    trainable._activations.offload.smallest = 1
    train_on_the_curve(world, mesh, trainable, model, **options)
    measured, planned = trainable.memory()["activations"], _predicted(world, mesh, config).memory["activations"]
    assert measured <= 1.02 * planned
