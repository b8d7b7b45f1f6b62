"""Rows that are divided into documents: losses and gradients are those of each document alone, in every layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_layouts import GPT, LLAMA, MISTRAL, VOCAB, configured, unsharded

from builders import configured_spec, meshes
from hvdlm import plugins
from hvdlm.config import Config
from hvdlm.parallel.mesh import Mesh
from hvdlm.protocols.types import Batch
from hvdlm.protocols.world import World
from launching import FRAMEWORK, RANKS

ROWS, TIME = 8, 16
# One step whose update is the gradient.
GRADIENT = {"optimizer": "sgd", "learning_rate": 1.0, "momentum": 0.0, "weight_decay": 0.0, "clip": 0.0}
TIED = {**GPT, "bias": True}
Variant = tuple[str, tuple[int, int, int], dict[str, Any], dict[str, Any]]
SEQUENCE, RECOMPUTED = {"parallel": {"sequence": True}}, {"train": {"activation_checkpointing": True}}
VARIANTS: list[Variant] = [
    *[("x".join(map(str, mesh.shape)), mesh.shape, TIED, {}) for mesh in meshes(RANKS)],
    ("zero", (RANKS, 1, 1), LLAMA, {"parallel": {"zero": 2}}),
    ("exact", (RANKS, 1, 1), TIED, {"communication": {"reduction": "exact", "exact_rows": 1}}),
    ("recomputed", (RANKS // 2, 2, 1), TIED, {**RECOMPUTED, "parallel": {"schedule": "gpipe"}}),
    ("sequence", (RANKS // 2, 1, 2), TIED, SEQUENCE),
    ("sequence-recomputed", (RANKS // 2, 1, 2), MISTRAL, {**SEQUENCE, **RECOMPUTED}),
    ("window", (1, RANKS, 1), {**MISTRAL, "layers": RANKS}, {}),
]
CHOSEN = ("1x2x1", "exact", "sequence", "sequence-recomputed", "1x2x2")  # TensorFlow traces each for seconds
NAMES = [variant[0] for variant in VARIANTS if FRAMEWORK == "torch" or variant[0] in CHOSEN]


def packed_batch() -> Batch:
    """Return rows of several documents, one of a single document, and one whose targets don't count at its end."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, VOCAB, (ROWS, TIME + 1)).astype(np.int32)
    begins = random.random((ROWS, TIME)) < 0.25
    begins[0], begins[:, 0] = False, True
    starts = np.maximum.accumulate(np.where(begins, np.arange(TIME), 0), 1).astype(np.int32)
    weights = np.ones((ROWS, TIME), np.float32)
    weights[1, 11:] = 0
    return Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), weights, True, document_starts=starts)


def alone(packed: Batch) -> Batch:
    """Return the same documents in rows of their own."""
    assert packed.document_starts is not None and packed.weights is not None
    rows = []
    for row, starts in enumerate(packed.document_starts):
        for start in np.unique(starts):
            columns = np.flatnonzero(starts == start)
            fields = (packed.inputs[row], packed.targets[row], packed.weights[row])
            rows.append([np.pad(field[columns], (0, TIME - len(columns))) for field in fields])
    inputs, targets, weights = (np.stack(field) for field in zip(*rows, strict=True))
    assert len(rows) > 3 * ROWS
    return Batch(inputs, targets, weights, True)


_REFERENCES: dict[str, list[Any]] = {}  # by model


def reference(world: World, model: dict[str, Any]) -> tuple[float, dict[str, np.ndarray], float]:
    """Return the loss and the gradients of each document alone, and the loss without masks, which rank 0 computes."""
    key = repr(sorted(model.items()))
    if world.rank == 0 and key not in _REFERENCES:
        config = configured(Mesh(1, 1, 1), model, train=GRADIENT)
        undivided = replace(packed_batch(), document_starts=None)
        without_masks, _ = trained(unsharded(config), [undivided])
        documents = alone(packed_batch())
        config.train.batch_size, config.train.micro_batch_size = len(documents.inputs), None
        loss, gradients = trained(unsharded(config), [documents])
        _REFERENCES[key] = [loss, {name: array.tolist() for name, array in gradients.items()}, without_masks]
    loss, gradients, without_masks = world.broadcast_object(_REFERENCES.get(key))
    return loss, {name: np.array(values, np.float32) for name, values in gradients.items()}, without_masks


def trained(trainable: Any, micro_batches: list[Batch]) -> tuple[float, dict[str, np.ndarray]]:
    """Return the loss of a step, and the gradients by parameters' names."""
    before = {name: array.copy() for name, array in trainable.state().items() if name.startswith("parameters/")}
    result = trainable.train_step(micro_batches, 1.0, 0)
    return result.loss, {name: before[name] - array for name, array in trainable.state().items() if name in before}


def build(world: World, mesh: Mesh, config: Config) -> Any:
    """Return a trainable on this rank, whose exchange may be exact."""
    manager = plugins.load([FRAMEWORK, "all_reduce", "exact"])
    exchange = plugins.make_exchange(manager, config, world, world.group(mesh.group("data", world.rank)))
    framework = plugins.make(manager, "framework", FRAMEWORK)
    return framework.build(configured_spec(config, VOCAB), mesh, world, exchange, config)


@pytest.mark.parametrize("name", NAMES)
def test_packed_documents_have_the_gradients_of_each_alone(world: World, name: str) -> None:
    _, shape, model, options = next(variant for variant in VARIANTS if variant[0] == name)
    mesh, packed = Mesh(*shape), packed_batch()
    layers = max(mesh.pipeline, 2 if FRAMEWORK == "torch" else 1)
    model = {**model, "layers": layers}
    loss, gradients, without_masks = reference(world, model)
    config = configured(mesh, model, **{**options, "train": GRADIENT | options.get("train", {})})
    trainable = build(world, mesh, config)
    share = ROWS // mesh.data
    first, micro = mesh.coordinates(world.rank)["data"] * share, config.train.micro_batch_size or share
    own = packed.rows(first, first + share)
    micro_batches = [own.rows(start, start + micro) for start in range(0, share, micro)]
    sum_before, tokens = trainable.eval_step(own)
    of_stage = mesh.coordinates(world.rank)["pipeline"] == mesh.pipeline - 1
    assert tokens == own.tokens and (sum_before > 0) == of_stage
    if mesh.data == 1 and of_stage:
        assert sum_before / tokens == pytest.approx(loss, abs=1e-5)
    computed, own_gradients = trained(trainable, micro_batches)
    assert computed == pytest.approx(loss, abs=1e-5)
    shards = trainable.shards()
    for parameter, gradient in own_gradients.items():
        expected = gradients[parameter][shards[parameter].slices]
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=2e-5, err_msg=parameter)
    assert abs(without_masks - loss) > 1e-3  # the masks make a difference
