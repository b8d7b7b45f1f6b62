"""Virtual pipeline stages (interleaved 1F1B) train, evaluate and generate as one unsharded rank does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_layouts import (
    GPT,
    HALF,
    PROMISED,
    STEPS,
    TOLERANCE,
    VOCAB,
    _predicted,
    assert_memory_is_predicted,
    assert_traffic_is_predicted,
    build,
    configured,
    learnable_batch,
    reference,
    train,
    train_on_the_curve,
    unsharded,
)

from builders import case, save_checkpoint
from hvdlm.checkpoints.load import open_checkpoint, read_state
from hvdlm.parallel.mesh import Mesh
from hvdlm.protocols.inference import SamplingRule
from hvdlm.protocols.types import Batch
from hvdlm.protocols.world import World
from hvdlm_inference.decoding import Text, decode
from launching import FRAMEWORK, RANKS

pytestmark = pytest.mark.skipif(FRAMEWORK not in ("torch", "tensorflow"), reason="frameworks with pipeline stages")

DEEP = {**GPT, "layers": 8}
VIRTUAL = {"parallel": {"virtual_stages": 2}}
MODELS = {"tied": {**GPT, "layers": 4}, "untied": {**GPT, "layers": 4, "tie_embeddings": False}}
if RANKS == 4:
    CASES: list[tuple[str, tuple[int, int, int], dict[str, Any], dict[str, Any]]] = [
        ("four-stages", (1, 4, 1), DEEP, {**VIRTUAL, "train": {"steps": PROMISED}}),
        ("data-zero1", (2, 2, 1), MODELS["tied"], {"parallel": {"virtual_stages": 2, "zero": 1}}),
        ("data", (2, 2, 1), MODELS["untied"], VIRTUAL),
        ("tensor-sequence", (1, 2, 2), MODELS["tied"], {"parallel": {"virtual_stages": 2, "sequence": True}}),
    ]
else:
    CASES = [
        ("tied", (1, 2, 1), MODELS["tied"], {**VIRTUAL, "train": {"steps": PROMISED}}),
        ("untied", (1, 2, 1), MODELS["untied"], {**VIRTUAL, "train": {"activation_checkpointing": True}}),
        ("four-chunks", (1, 2, 1), DEEP, {"parallel": {"virtual_stages": 4}}),
    ]


# TensorFlow traces its graphs anew for every layout, which takes seconds on few cores: it runs a selection.
OTHERS = "TensorFlow's selection, and PyTorch's runs of these layouts"
SELECTED = ("tied", "data-zero1") if FRAMEWORK == "tensorflow" else tuple(one[0] for one in CASES)
SELECTION = [case(*one, covered_by="" if one[0] in SELECTED else OTHERS, id=one[0]) for one in CASES]


@pytest.mark.parametrize("name, shape, model, options", SELECTION)
def test_virtual_stages_follow_the_curve_of_one_rank(
    world: World, name: str, shape: tuple[int, int, int], model: dict[str, Any], options: dict[str, Any]
) -> None:
    mesh = Mesh(*shape)
    config = configured(mesh, model, **options)
    trainable = build(world, mesh, config)
    results = train_on_the_curve(world, mesh, trainable, model, **options)
    assert_traffic_is_predicted(world, mesh, config, results)
    measured, planned = trainable.memory()["activations"], _predicted(world, mesh, config).memory["activations"]
    assert_memory_is_predicted(world, mesh, config, trainable)
    if not config.train.activation_checkpointing:  # TensorFlow's graphs keep more: docs/parallelism.md
        low, high = (0.98, 1.02) if FRAMEWORK == "torch" else (1.0, 2.4)
        assert low < measured / planned < high


LAYOUTS = [(Mesh(1, RANKS, 1), 1), (Mesh(RANKS, 1, 1), 1), (Mesh(RANKS // 2, 2, 1), 4 if RANKS == 2 else 2)]


@pytest.mark.skipif(FRAMEWORK != "torch", reason="names and shards of checkpoints are made by the core")
def test_checkpoints_resume_with_other_virtual_stages(world: World, tmp_path_factory: pytest.TempPathFactory) -> None:
    """From two virtual stages a rank to layouts without them, and from those to virtual stages."""
    model = DEEP
    losses, _, _ = reference(world, model)
    folder = Path(world.broadcast_object(str(tmp_path_factory.mktemp("virtual")) if world.rank == 0 else None))
    mesh, written = Mesh(RANKS // 2, 2, 1), []
    for number, virtual in enumerate((2, 1)):
        config = configured(mesh, model, parallel={"virtual_stages": virtual})
        trainable = build(world, mesh, config)
        train(trainable, mesh, world.rank, range(HALF), config)
        into = folder / str(number)
        written.append(save_checkpoint(into, HALF, trainable.state(), {}, world, trainable.shards()))
    for path, (mesh, virtual) in zip((written[0], written[0], written[1]), LAYOUTS, strict=True):
        config = configured(mesh, model, parallel={"virtual_stages": virtual})
        trainable, opened = build(world, mesh, config), open_checkpoint(path)
        trainable.load_state(read_state(opened, trainable.shards(), world.rank, world.size))
        again = train(trainable, mesh, world.rank, range(HALF, STEPS), config)
        assert [r.loss for r in again] == pytest.approx(losses[HALF:STEPS], abs=TOLERANCE)


@pytest.mark.parametrize("name", [case("tied", covered_by=OTHERS if FRAMEWORK == "tensorflow" else ""), "untied"])
def test_evaluation_and_texts_equal_one_rank(world: World, name: str) -> None:
    """Batches of any number of rows pass chunk after chunk; every chunk has a cache of its own."""
    mesh, model = Mesh(1, 2, RANKS // 2), {**MODELS[name], "initial_scale": 0.5}
    config = configured(mesh, model, **VIRTUAL)
    rows = learnable_batch(3, config.data.context)
    short = Batch(rows.inputs[:3, :-3].copy(), rows.targets[:3, :-3].copy(), None, True)
    rule, prompts = SamplingRule(VOCAB, 0.9, 0, 0.95), [[1, 2, 3], [4], [5, 6, 7, 8]]

    def results(trainable: Any) -> list[Any]:
        losses = [trainable.eval_step(batch)[0] for batch in (replace(rows, reset=True), short)]
        scores, cache = trainable.logits(rows.inputs[:1, :3])
        logits = [scores.tolist()]
        for token in (7, 50):
            scores, cache = trainable.logits(np.array([[token]], np.int32), cache)
            logits.append(scores.tolist())
        texts = [Text(np.int32(prompt), 20, seed) for seed, prompt in enumerate(prompts)]
        for _ in decode(trainable, texts, config.data.context, rule, 2, ()):
            pass
        return [losses, logits, [text.generated for text in texts]]

    losses, logits, texts = results(build(world, mesh, config))
    alone = results(unsharded(configured(Mesh(1, 1, 1), model))) if world.rank == 0 else None
    expected_losses, expected_logits, expected_texts = world.broadcast_object(alone)
    np.testing.assert_allclose(logits, expected_logits, rtol=1e-4, atol=1e-4)
    assert texts == expected_texts and len(texts[0]) == 20
    if mesh.coordinates(world.rank)["pipeline"] == 1:
        assert losses == pytest.approx(expected_losses, rel=1e-5)
    else:
        assert losses == [0.0, 0.0]
