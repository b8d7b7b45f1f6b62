"""Data, tensor and pipeline ranks in every combination train as one unsharded rank does."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders import case, configured_spec, meshes, next_token_batch, save_checkpoint, single_rank_trainable
from hvdlm import plugins
from hvdlm.checkpoints.load import open_checkpoint, read_state
from hvdlm.config import Config, LoRAConfig, ModelConfig, ParallelConfig, TrainConfig
from hvdlm.parallel.mesh import Mesh
from hvdlm.planning.closed_forms import predict_costs
from hvdlm.protocols.inference import SamplingRule
from hvdlm.protocols.types import Batch, StepResult
from hvdlm.protocols.world import World
from hvdlm_inference.decoding import Text, decode
from launching import BACKEND, FRAMEWORK, RANKS

VOCAB, CONTEXT, ROWS, STEPS, HALF = 51, 16, 8, 8, 4
RECURRENT_CONTEXT = 6 if FRAMEWORK == "torch" else 4  # recurrent models send, and TensorFlow traces, every position
LONG_STEPS = (40 if "HVDLM_TEST_FULL" in os.environ else 24) if BACKEND == "threads" else STEPS
# Steps of the curves that docs/parallelism.md promises, which ranks in threads follow to their end.
PROMISED = 50 if "HVDLM_TEST_FULL" in os.environ or BACKEND == "threads" else STEPS
EVERYWHERE = FRAMEWORK == "torch" and BACKEND == "threads"  # whose layouts take least time
TOLERANCE = 2e-4 if FRAMEWORK == "tensorflow" else 1e-4
GPT = {"name": "gpt", "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "bias": False}
DEEP = {**GPT, "layers": 4}  # as many as stages can be here
# Tracing or compiling takes longer than training: frameworks that do have as many layers as stages, and two in
# test_update_equations.py.
FEWEST_LAYERS = 2 if FRAMEWORK == "torch" else 1
SHALLOW = {**GPT, "layers": FEWEST_LAYERS}


def configured(mesh: Mesh, model: dict[str, Any], **options: Any) -> Config:
    """Return the configuration of a small model on ``mesh``; ``options`` of train, parallel, communication and lora."""
    config = Config(framework=FRAMEWORK, model=ModelConfig(**model))
    config.data.context = RECURRENT_CONTEXT if model["name"] in ("rnn", "gru", "lstm") else CONTEXT
    # Stages have micro-batches to fill a pipeline of two or four, other layouts two of them, or one.
    micro_rows = 2 if mesh.pipeline > 1 else max(2, ROWS // mesh.data // 2)
    train = {"batch_size": ROWS, "micro_batch_size": micro_rows, "warmup": 0, "steps": STEPS}
    config.train = TrainConfig(**train | options.get("train", {}))
    config.parallel = ParallelConfig(*mesh.shape, **options.get("parallel", {}))
    config.lora = LoRAConfig(**options.get("lora", {}))
    config.communication = replace(config.communication, bucket_bytes=20_000, **options.get("communication", {}))
    return config


def build(world: World, mesh: Mesh, config: Config, vocab: int = VOCAB) -> Any:
    """Return a trainable on this rank of ``mesh``."""
    exact = ["exact"] if config.communication.reduction == "exact" else []
    manager = plugins.load([FRAMEWORK, config.communication.exchange, "compression", *exact])
    spec = configured_spec(config, vocab)
    manager.hook.hvdlm_check(config=config, spec=spec)
    exchange = plugins.make_exchange(manager, config, world, world.group(mesh.replica_group(world.rank)))
    return plugins.make(manager, "framework", FRAMEWORK).build(spec, mesh, world, exchange, config)


def learnable_batch(step: int, context: int = CONTEXT, rows: int = ROWS) -> Batch:
    """Return rows in which most tokens follow from the previous one; some targets don't count."""
    random = np.random.default_rng(step)
    tokens = random.integers(0, VOCAB, (rows, context + 1)).astype(np.int32)
    for position in range(context):
        follows = random.random(rows) < 0.8
        tokens[follows, position + 1] = (5 * tokens[follows, position] + 3) % VOCAB
    mask = (random.random((rows, context)) < 0.8).astype(np.float32)
    return next_token_batch(tokens, mask, step % 10 == 0)


def train(trainable: Any, mesh: Mesh, rank: int, steps: range, config: Config) -> list[StepResult]:
    """Return the results of ``steps`` steps on this rank's rows."""
    share = config.train.batch_size // mesh.data
    first = mesh.coordinates(rank)["data"] * share
    micro, results = config.train.micro_batch_size or share, []
    for step in steps:
        whole = learnable_batch(step, config.data.context, config.train.batch_size).rows(first, first + share)
        micro_batches = [whole.rows(start, start + micro) for start in range(0, share, micro)]
        results.append(trainable.train_step(micro_batches, config.train.learning_rate, step))
    return results


def unsharded(config: Config) -> Any:
    """Return the trainable of one rank that holds the whole model."""
    return single_rank_trainable(configured_spec(config, VOCAB), config)


_REFERENCES: dict[str, Any] = {}
Reference = tuple[list[float], list[float], dict[str, np.ndarray]]


def _train_unsharded(model: dict[str, Any], options: dict[str, Any]) -> Any:
    """Return the losses and gradient norms of an unsharded run, and its parameters after ``STEPS`` steps and all."""
    mesh = Mesh(1, 1, 1)
    config = configured(mesh, model, **options)
    trainable = unsharded(config)
    results, states, last = [], {}, config.train.steps
    for first, stop in ((0, min(STEPS, last)), (STEPS, last)):
        results += train(trainable, mesh, 0, range(first, stop), config)
        states[stop] = {k: v.tolist() for k, v in trainable.state().items() if k.startswith("parameters/")}
    return [[r.loss for r in results], [r.grad_norm for r in results], list(states.items())]


def _reference_of(model: dict[str, Any], options: dict[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return (a key, model, options of train and lora) of the unsharded run that a layout has to follow.

    Micro-batches, activation checkpointing and offload change no result: such variants share one reference. A shorter
    curve is the beginning of the longer one.
    """
    same = ("micro_batch_size", "activation_checkpointing", "activation_offload")
    train_options = {"steps": STEPS, **{k: v for k, v in options.get("train", {}).items() if k not in same}}
    lora = options.get("lora", {})
    like_gpt = {**model, "layers": GPT["layers"]} == GPT and model["layers"] <= GPT["layers"]
    if like_gpt and not lora and train_options == {"steps": STEPS}:
        train_options["steps"] = LONG_STEPS
    train_options["micro_batch_size"] = None
    key = repr([sorted(entries.items()) for entries in (model, train_options, lora)])
    return key, model, {"train": train_options, "lora": lora}


def reference(world: World, model: dict[str, Any], **options: Any) -> Reference:
    """Return (losses, gradient norms, parameters) of an unsharded run; ranks compute different ones and share them."""
    key = _reference_of(model, options)[0]
    every = [(model, options)]
    if RANKS == 4 and BACKEND == "threads":  # which all of them are for
        every += [({**GPT, "layers": layers}, {}) for layers in ({2, 4} if FRAMEWORK == "torch" else {2})]
        every += [(model, options) for name, _, model, options in CHOSEN if name not in LEFT_OUT]
    wanted = {name: rest for name, *rest in (_reference_of(*one) for one in every)}
    # Where ranks are threads, they share the references: what is missing is what rank 0 misses.
    missing = [] if key in _REFERENCES else [name for name in wanted if name not in _REFERENCES]
    missing = world.broadcast_object(missing if world.rank == 0 else None)
    computed = {name: _train_unsharded(*wanted[name]) for name in missing[world.rank :: world.size]}
    for references in world.gather_objects(computed) if missing else []:
        for name, (losses, norms, states) in references.items():
            arrays = {steps: {k: np.array(v, np.float32) for k, v in state.items()} for steps, state in states}
            _REFERENCES[name] = losses, norms, arrays
    steps = options.get("train", {}).get("steps", STEPS)
    losses, norms, states = _REFERENCES[key]
    return losses[:steps], norms[:steps], states[steps]


def assert_follows_one_rank(world: World, mesh: Mesh, model: dict[str, Any], **options: Any) -> list[StepResult]:
    """Train on ``mesh`` and compare with one unsharded rank; return the results."""
    trainable = build(world, mesh, configured(mesh, model, **options))
    return train_on_the_curve(world, mesh, trainable, model, **options)


def train_on_the_curve(
    world: World,
    mesh: Mesh,
    trainable: Any,
    model: dict[str, Any],
    at_half: Callable[[], Any] | None = None,
    **options: Any,
) -> list[StepResult]:
    """Train from the initial values and compare with one unsharded rank; return the results.

    ``at_half``: called after ``HALF`` steps.
    """
    losses, norms, parameters = reference(world, model, **options)
    config = configured(mesh, model, **options)
    results = train(trainable, mesh, world.rank, range(HALF), config)
    if at_half is not None:
        at_half()
    results += train(trainable, mesh, world.rank, range(HALF, config.train.steps), config)
    assert max(abs(r.loss - expected) for r, expected in zip(results, losses, strict=True)) < TOLERANCE
    assert max(abs(r.grad_norm - expected) for r, expected in zip(results, norms, strict=True)) < TOLERANCE
    state, shards = trainable.state(), trainable.shards()
    for name in (n for n in state if n.startswith("parameters/")):
        expected = parameters[name][shards[name].slices]
        if (elements := shards[name].flat) is not None:
            expected = expected.reshape(-1)[slice(*elements)]
        np.testing.assert_allclose(state[name], expected, rtol=0, atol=1e-4, err_msg=name)
    assert len(set(losses)) == config.train.steps
    return results


def cases(size: int) -> list[tuple[Mesh, int]]:
    return [(mesh, zero) for mesh in meshes(size) for zero in ((0, 1, 2) if mesh.data > 1 else (0,))]


def case_name(case: Any) -> str:
    mesh, zero = case
    return f"{'x'.join(map(str, mesh.shape))}-zero{zero}"


# Layouts whose curves are long, for errors that add up: one per axis, and one of two axes with ZeRO.
LONG = [(Mesh(2, 1, 1), 1), (Mesh(1, 2, 1), 0), (Mesh(1, 1, 2), 0), (Mesh(2, 1, 2), 2)]
# One layout writes a checkpoint in the middle of its curve, from which others resume, all with the same layers.
WRITER, READERS = (Mesh(2, 1, 2), 1), [(Mesh(1, 2, 2), 0), (Mesh(4, 1, 1), 2), (Mesh(2, 2, 1), 1)]
_WRITTEN: list[str] = []  # the checkpoint
# The layouts that TensorFlow trains, in threads and in processes: a trace of each on every rank takes a second.
TENSORFLOW = [WRITER, (Mesh(2, 2, 1), 1)] if BACKEND == "threads" else [(Mesh(1, 2, 1), 0), (Mesh(2, 1, 2), 2)]


# Layouts of four ranks in threads of which the update equation is tested, and the curve of the same axes with another
# stage of ZeRO.
ALIKE = [(Mesh(4, 1, 1), 0), (Mesh(4, 1, 1), 1), (Mesh(2, 2, 1), 0), (Mesh(2, 2, 1), 2), (Mesh(2, 1, 2), 0)]


def write_checkpoint(world: World, trainable: Any, folders: pytest.TempPathFactory) -> str:
    """Save the state of ``trainable`` after ``HALF`` steps; return the checkpoint's path."""
    folder = Path(world.broadcast_object(str(folders.mktemp("layouts")) if world.rank == 0 else None))
    path = str(save_checkpoint(folder, HALF, trainable.state(), {}, world, trainable.shards()))
    _WRITTEN.append(path)
    return path


def written_checkpoint(world: World, folders: pytest.TempPathFactory) -> Path:
    """Return the checkpoint of ``WRITER``, which trains where its test has not run."""
    path = world.broadcast_object(_WRITTEN[:1] if world.rank == 0 else None)
    if not path:
        mesh, zero = WRITER
        config = configured(mesh, GPT, parallel={"zero": zero})
        trainable = build(world, mesh, config)
        train(trainable, mesh, world.rank, range(HALF), config)
        path = [write_checkpoint(world, trainable, folders)]
    return Path(path[0])


def assert_resumes(world: World, mesh: Mesh, trainable: Any, config: Config, folders: pytest.TempPathFactory) -> None:
    """Continue from the checkpoint of ``WRITER``, in a trainable that has done no step; then undo it."""
    initial, opened = trainable.state(), open_checkpoint(written_checkpoint(world, folders))
    trainable.load_state(read_state(opened, trainable.shards(), world.rank, world.size))
    losses, _, _ = reference(world, GPT)
    again = train(trainable, mesh, world.rank, range(HALF, STEPS), config)
    assert max(abs(r.loss - expected) for r, expected in zip(again, losses[HALF:], strict=True)) < TOLERANCE
    trainable.load_state(initial)


def layout_cases() -> list[Any]:
    """Return the cases of this launch, the one that writes a checkpoint first."""
    ordered = sorted(cases(RANKS), key=lambda layout: layout != WRITER)
    if FRAMEWORK == "tensorflow":
        others = "TensorFlow's other layouts of these axes, and this layout of PyTorch"
        left = [layout for layout in ordered if layout not in TENSORFLOW]
    else:
        others, left = "this layout's update equation, and its axes' curve with another stage of ZeRO", ALIKE
    return [case(layout, covered_by=others if layout in left else "") for layout in ordered]


@pytest.mark.parametrize("case", layout_cases(), ids=case_name)
def test_every_layout_follows_the_curve_of_one_rank(
    world: World, case: tuple[Mesh, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Some of them after they have resumed from another layout's checkpoint."""
    mesh, zero = case
    model = {**GPT, "layers": GPT["layers"] if case in (WRITER, *READERS) else max(mesh.pipeline, FEWEST_LAYERS)}
    options: dict[str, Any] = {"parallel": {"zero": zero}}
    options["train"] = {"steps": LONG_STEPS if case in LONG else STEPS}
    if FRAMEWORK == "tensorflow" and mesh.tensor > 1 and mesh.pipeline == 1 and zero < 2:
        # Other layouts add up the gradients of micro-batches, in another graph to trace.
        options["train"]["micro_batch_size"] = None
    if mesh.shape == (1, 1, 2):
        options["train"] |= TERMS
    config = configured(mesh, model, **options)
    trainable = build(world, mesh, config)
    if case in READERS:
        assert_resumes(world, mesh, trainable, config, tmp_path_factory)
    at_half = partial(write_checkpoint, world, trainable, tmp_path_factory) if case == WRITER else None
    results = train_on_the_curve(world, mesh, trainable, model, at_half, **options)
    assert_traffic_is_predicted(world, mesh, config, results)
    assert_memory_is_predicted(world, mesh, config, trainable)


def _predicted(world: World, mesh: Mesh, config: Config) -> Any:
    return predict_costs(plugins.load([FRAMEWORK]), config, configured_spec(config, VOCAB), mesh, world.rank)


def assert_traffic_is_predicted(world: World, mesh: Mesh, config: Config, results: list[StepResult]) -> None:
    expected = _predicted(world, mesh, config).bytes
    for result in (results[0], results[-1]):
        assert result.axis_bytes == expected and result.comm_bytes == sum(expected.values())


def assert_memory_is_predicted(world: World, mesh: Mesh, config: Config, trainable: Any) -> None:
    trainable._example_passes = {}  # activations, for which TensorFlow would trace a stage again, are not compared
    held, expected = trainable.memory(), _predicted(world, mesh, config).memory
    for kind in ("parameters", "gradients", "optimizer"):
        assert held[kind] == expected[kind], kind


@pytest.mark.skipif(RANKS != 2, reason="data parallelism only: two ranks show what four would")
@pytest.mark.parametrize("zero", [2] if FRAMEWORK == "tensorflow" else [0, 1, 2])
def test_adapters_follow_one_rank_and_alone_are_communicated(world: World, zero: int) -> None:
    mesh, more = Mesh(2, 1, 1), {"lora": {"rank": 2}, "train": {"steps": 8}}
    config = configured(mesh, SHALLOW, parallel={"zero": zero}, **more)
    losses, norms, _ = reference(world, SHALLOW, **more)
    trainable = build(world, mesh, config)
    results = train(trainable, mesh, world.rank, range(8), config)
    assert [r.loss for r in results] == pytest.approx(losses, abs=TOLERANCE)
    assert [r.grad_norm for r in results] == pytest.approx(norms, abs=TOLERANCE)
    assert_traffic_is_predicted(world, mesh, config, results)
    assert_memory_is_predicted(world, mesh, config, trainable)
    dense = configured(mesh, SHALLOW, parallel={"zero": zero})
    assert results[-1].comm_bytes < 0.15 * sum(_predicted(world, mesh, dense).bytes.values())
    if zero == 0:
        assert results[-1].comm_bytes == 4 * configured_spec(config, VOCAB).parameters + 2 * 8


RECOMPUTING = {"activation_checkpointing": True}
SGD = {"optimizer": "sgd", "learning_rate": 0.3, "momentum": 0.9, "weight_decay": 0.1, "clip": 0.5}
TERMS = {"label_smoothing": 0.1, "z_loss": 0.01}  # which ranks compute of their parts of the scores
GROUPS = {"embed.*": {"learning_rate_scale": 0.5, "weight_decay": 0.0}, "*.value": {"weight_decay": 0.5}}
LLAMA = {"name": "llama", "layers": FEWEST_LAYERS, "width": 32, "heads": 4, "kv_heads": 1}
# Settings of newer models; of fewer key-value heads than tensor ranks, too.
SMALL = {"layers": FEWEST_LAYERS, "width": 32, "heads": 4}
MISTRAL = {"name": "mistral", **SMALL, "layers": 2, "kv_heads": 2, "window": 5}
QWEN2 = {"name": "qwen2", **SMALL, "kv_heads": 2, "rotary_scaling": 8.0, "rotary_scaling_context": 12}
QWEN3 = {"name": "qwen3", **SMALL, "kv_heads": 2, "head_width": 12}
NEOX = {"name": "neox", **SMALL, "rotary_share": 0.5}
GEMMA = {"name": "gemma", **SMALL, "layers": 2, "kv_heads": 1, "head_width": 12}
VARIANTS: list[tuple[str, tuple[int, int, int], dict[str, Any], dict[str, Any]]] = [
    ("llama", (1, 1, 4), LLAMA, {}),
    ("llama-sequence", (1, 1, 4), LLAMA, {"parallel": {"sequence": True}, "train": TERMS}),
    ("biases-sequence", (2, 1, 2), {**GPT, "bias": True}, {"parallel": {"sequence": True, "zero": 1}, "train": SGD}),
    ("stages-sequence", (1, 2, 2), {**GPT, "bias": True}, {"parallel": {"sequence": True}, "train": SGD}),
    ("gpipe", (1, 4, 1), DEEP, {"parallel": {"schedule": "gpipe"}}),
    ("stages-zero2", (2, 2, 1), {**GPT, "tie_embeddings": False}, {"parallel": {"zero": 2}}),
    ("recomputed", (1, 2, 2), GPT, {"train": {"activation_checkpointing": True}}),
    ("whole-batches", (2, 1, 2), GPT, {"train": {"micro_batch_size": None}, "parallel": {"zero": 2}}),
    ("mistral-stages", (2, 2, 1), MISTRAL, {"parallel": {"zero": 1}}),
    ("qwen2", (1, 1, 4), QWEN2, {"train": SGD}),
    ("qwen3", (2, 1, 2), QWEN3, {"parallel": {"zero": 2}}),
    ("qwen3-sequence", (1, 1, 4), QWEN3, {"parallel": {"sequence": True}}),
    ("neox-recomputed", (2, 1, 2), NEOX, {"parallel": {"sequence": True}, "train": {**SGD, **RECOMPUTING}}),
    ("gemma-stages", (1, 2, 2), GEMMA, {"parallel": {"sequence": True}}),
    ("lstm", (1, 2, 2), {"name": "lstm", "layers": 2, "width": 32}, {"train": SGD}),
    ("gru", (2, 1, 2), {"name": "gru", "layers": 1, "width": 32}, {"parallel": {"zero": 1}, "train": SGD}),
    ("groups", (2, 1, 2), GPT, {"parallel": {"zero": 1}, "train": {"groups": GROUPS}}),
    ("rnn", (1, 1, 4), {"name": "rnn", "layers": 2, "width": 32, "tie_embeddings": True}, {"train": SGD}),
]

LSTM = {"name": "lstm", "layers": 2, "width": 32}
ROTARY = {**GPT, "positions": "rotary"}
SHARING = [
    ("tensor", (1, 1, 2), SHALLOW, {}),
    ("sequence", (1, 1, 2), {**GPT, "bias": True}, {"parallel": {"sequence": True}}),
    ("pipeline", (1, 2, 1), {**GPT, "tie_embeddings": False}, {}),
    ("lstm", (1, 1, 2), LSTM, {}),
    ("lstm-stages", (1, 2, 1), LSTM, {}),
]
SHARING = SHARING if FRAMEWORK == "torch" else [SHARING[0], SHARING[2]]  # TensorFlow traces each for 10 s


@pytest.mark.skipif(RANKS != 2, reason="two ranks show what four would")
@pytest.mark.parametrize("name, shape, model, options", SHARING, ids=[one[0] for one in SHARING])
def test_bf16_activations_cost_half_and_follow_one_rank(
    world: World, name: str, shape: tuple[int, int, int], model: dict[str, Any], options: dict[str, Any]
) -> None:
    mesh, terms = Mesh(*shape), TERMS if name == "tensor" else {}
    train_options = {"steps": 10, "precision": "bf16", **terms}
    losses, _, _ = reference(world, model, train=train_options)
    config = configured(mesh, model, train=train_options, **options)
    trainable = build(world, mesh, config)
    results = train(trainable, mesh, world.rank, range(10), config)
    assert [r.loss for r in results] == pytest.approx(losses, abs=2e-2)
    assert_traffic_is_predicted(world, mesh, config, results)
    axis, whole = ("pipeline" if mesh.pipeline > 1 else "tensor"), configured(mesh, model, train=terms, **options)
    in_fp32 = _predicted(world, mesh, whole).bytes[axis]
    # Three figures of every target, with smoothing four, and the gradients of replicated parameters stay fp32.
    figures = 4 if terms else 3
    wide = 0 if axis == "pipeline" else figures * 4 * ROWS * config.data.context + _replicated_bytes(name, config)
    assert results[-1].axis_bytes[axis] == (in_fp32 - wide) // 2 + wide
    if FRAMEWORK == "torch" and name == "tensor":
        measured, planned = trainable.memory()["activations"], _predicted(world, mesh, config).memory["activations"]
        assert measured == pytest.approx(planned, rel=0.02)


def _replicated_bytes(name: str, config: Config) -> int:
    """Return the bytes of gradients of positions, norms and biases that sequence parallelism sums in a step."""
    width, layers = config.model.width, config.model.layers
    elements = CONTEXT * width + 2 * width + layers * (2 * 2 * width + 2 * width)
    return 4 * elements * ROWS // (config.train.micro_batch_size or ROWS) if name == "sequence" else 0


# TensorFlow traces its graphs anew for every layout, which takes seconds on few cores: it runs a selection.
SELECTED = ("llama-sequence", "stages-sequence-recomputed", "stages-zero2", "lstm", "qwen3-sequence")
if FRAMEWORK == "tensorflow":  # both switches in one graph
    RECOMPUTED = {"parallel": {"sequence": True}, "train": {**SGD, "activation_checkpointing": True}}
    VARIANTS.append(("stages-sequence-recomputed", (1, 2, 2), {**GPT, "bias": True}, RECOMPUTED))
CHOSEN = [variant for variant in VARIANTS if FRAMEWORK == "torch" or variant[0] in SELECTED]
LEFT_OUT = {"stages-zero2": "2x2x1-zero1 of every_layout, and ZeRO 2 of two ranks"}
LEFT_OUT |= {"llama": "llama-sequence, and large batches of llama on two ranks"}
VARIANT_CASES = [case(*variant, covered_by=LEFT_OUT.get(variant[0], ""), id=variant[0]) for variant in CHOSEN]


@pytest.mark.skipif(RANKS != 4, reason="layouts of four ranks")
@pytest.mark.parametrize("name, shape, model, options", VARIANT_CASES)
def test_models_and_switches_follow_the_curve_of_one_rank(
    world: World, name: str, shape: tuple[int, int, int], model: dict[str, Any], options: dict[str, Any]
) -> None:
    mesh = Mesh(*shape)
    results = assert_follows_one_rank(world, mesh, model, **options)
    assert_traffic_is_predicted(world, mesh, configured(mesh, model, **options), results)


LARGE: list[tuple[tuple[int, int, int], dict[str, Any], dict[str, Any]]] = [
    ((1, 1, 2), {**GPT, "bias": True}, {}),
    ((1, 1, 2), LLAMA, {}),  # one key-value head that both ranks hold
    ((1, 1, 2), GPT, {"parallel": {"sequence": True}}),
    ((1, 2, 1), GPT, {}),  # the last stage's head is the first one's embedding
    ((2, 1, 1), GPT, {"parallel": {"zero": 2}}),
    ((2, 1, 1), GPT, {"parallel": {"zero": 3}}),
]


@pytest.mark.skipif(RANKS != 2 or FRAMEWORK != "torch", reason="what PyTorch computes from thresholds on")
@pytest.mark.parametrize("shape, model, options", LARGE)
def test_ways_to_compute_large_batches_follow_one_rank(
    world: World,
    shape: tuple[int, int, int],
    model: dict[str, Any],
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Joined weights, padded vocabularies and logits in chunks, beside one rank that has none of them."""
    from hvdlm_torch import kernels, losses

    options = {**options, "train": {**SGD, "steps": 8}}
    reference(world, model, **options)
    monkeypatch.setattr(kernels, "_FEWEST_ROWS_JOINED", 1)
    monkeypatch.setattr(kernels, "ONEDNN_IS_FASTER", False)
    for module in (kernels, losses):
        monkeypatch.setattr(module, "missing_outputs", lambda x, weight: -len(weight) % 64)
    monkeypatch.setitem(losses._CHUNK, "cpu", 5 * VOCAB)
    assert_follows_one_rank(world, Mesh(*shape), model, **options)


@pytest.mark.skipif(RANKS != 4, reason="layouts of four ranks")
def test_memory_per_rank_shrinks_with_the_mesh(world: World) -> None:
    def held(shape: tuple[int, int, int], kind: str, zero: int = 0) -> float:
        mesh = Mesh(*shape)
        model = {"name": "gpt", "layers": 8, "width": 64, "heads": 4, "tie_embeddings": False}
        trainable = build(world, mesh, configured(mesh, model, parallel={"zero": zero}))
        return max(world.gather_objects(trainable.memory()[kind]))

    whole = held((4, 1, 1), "parameters")
    assert held((1, 1, 4), "parameters") <= 0.30 * whole
    assert held((1, 4, 1), "parameters") <= 0.35 * whole
    assert held((4, 1, 1), "optimizer", 1) <= 0.27 * held((4, 1, 1), "optimizer")


@pytest.mark.skipif(RANKS != 4, reason="layouts of four ranks")
@pytest.mark.parametrize("shape", [(1, 1, 4), (1, 2, 2), (1, 4, 1)] if EVERYWHERE else [(1, 2, 2)])
@pytest.mark.parametrize("model", [{**GPT, "bias": True}, LSTM], ids=["gpt", "lstm"])
def test_evaluation_and_generation_equal_one_rank(
    world: World, shape: tuple[int, int, int], model: dict[str, Any]
) -> None:
    mesh, one, model = Mesh(*shape), Mesh(1, 1, 1), {**model, "layers": max(shape[1], 2)}
    sequence = {"sequence": model["name"] == "gpt" and mesh.tensor > 1}
    config = configured(mesh, model, parallel=sequence)
    trainable = build(world, mesh, config)
    at = mesh.coordinates(world.rank)
    rows = learnable_batch(3, config.data.context)
    # An uneven last batch, with fewer rows and a length that is no multiple of the tensor ranks.
    short = Batch(rows.inputs[:3, :-3].copy(), rows.targets[:3, :-3].copy(), None, True)
    losses = [trainable.eval_figures(b) for b in (replace(rows, reset=True), short)]
    scores, cache = trainable.logits(rows.inputs[:1, :3])
    logits = [scores.tolist()]
    for token in (7, 50, 0):
        scores, cache = trainable.logits(np.array([[token]], np.int32), cache)
        logits.append(scores.tolist())
    if world.rank == 0:
        alone = unsharded(configured(one, model))
        expected_losses = [alone.eval_figures(b) for b in (replace(rows, reset=True), short)]
        expected, cache = alone.logits(rows.inputs[:1, :3])
        expected_logits = [expected.tolist()]
        for token in (7, 50, 0):
            expected, cache = alone.logits(np.array([[token]], np.int32), cache)
            expected_logits.append(expected.tolist())
    else:
        expected_losses = expected_logits = None
    expected_losses, expected_logits = world.broadcast_object([expected_losses, expected_logits])
    np.testing.assert_allclose(logits, expected_logits, rtol=1e-4, atol=1e-5)
    if at["pipeline"] == mesh.pipeline - 1:
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)


SHAPES = [(1, 1, 2), (1, 2, 1)] if RANKS == 2 else [(1, 1, 4), (1, 2, 2)]
TEXTS = [(shape, model) for model in (GPT, ROTARY, LSTM) for shape in SHAPES]
if FRAMEWORK == "tensorflow":  # which traces every length and number of texts
    TEXTS = [*((shape, ROTARY) for shape in SHAPES), (SHAPES[-1], LSTM)]


@pytest.mark.parametrize("shape, model", TEXTS, ids=str)
def test_a_batch_of_texts_equals_one_rank(world: World, shape: tuple[int, int, int], model: dict[str, Any]) -> None:
    """Prompts of several lengths, stop tokens, and texts beyond the context."""
    mesh, model = Mesh(*shape), {**model, "layers": max(shape[1], FEWEST_LAYERS), "initial_scale": 0.5}
    config = configured(mesh, model)
    prompts = [[1, 2, 3], [4], [1, 2, 3], [5, 6, 7, 8]]
    rule = SamplingRule(VOCAB, 0.9, 0, 0.95)

    def tokens(trainable: Any, stop: tuple[int, ...]) -> list[list[int]]:
        texts = [Text(np.int32(prompt), 20, seed) for seed, prompt in enumerate(prompts)]
        for _ in decode(trainable, texts, config.data.context, rule, 3, stop):
            pass
        return [text.generated for text in texts]

    def both(trainable: Any) -> list[list[int]]:
        whole = tokens(trainable, ())
        return whole + tokens(trainable, (whole[0][2], whole[1][7]))

    together = both(build(world, mesh, config))
    assert all(of_rank == together for of_rank in world.gather_objects(together))
    expected = both(unsharded(configured(Mesh(1, 1, 1), model))) if world.rank == 0 else None
    assert together == world.broadcast_object(expected) and len(together[4]) <= 3 < 20 == len(together[0])


WITH_TENSOR, WITH_STAGES = (2, 1, 2), (2, 2, 1)
COMPRESSED = [("top_k", 0, WITH_STAGES), ("top_k", 1, WITH_STAGES)]
if FRAMEWORK == "torch":
    COMPRESSED += [
        (*one, shape) for shape in (WITH_TENSOR, WITH_STAGES) for one in (("int8", 0), ("int8", 1), ("power_sgd", 0))
    ]
    COMPRESSED += [("top_k", 0, WITH_TENSOR), ("top_k", 1, WITH_TENSOR)]
# Every compressor and every stage of ZeRO beside tensor ranks and beside stages, but not each with each.
KEPT = [("top_k", 1, WITH_STAGES), ("int8", 0, WITH_STAGES), ("int8", 1, WITH_TENSOR), ("power_sgd", 0, WITH_TENSOR)]


OTHERS = "the other compressors with these axes, and this one with other axes"
COMPRESSED_CASES = [case(*values, covered_by="" if values in KEPT else OTHERS) for values in COMPRESSED]


@pytest.mark.skipif(RANKS != 4, reason="layouts of four ranks")
@pytest.mark.parametrize("algorithm, zero, shape", COMPRESSED_CASES)
def test_data_axis_compression_works_with_tensor_and_pipeline(
    world: World, algorithm: str, zero: int, shape: tuple[int, int, int]
) -> None:
    mesh = Mesh(*shape)
    # TensorFlow has one graph to trace where no gradients of micro-batches are added up.
    train_options = {"micro_batch_size": None} if FRAMEWORK == "tensorflow" else {}
    config = configured(mesh, GPT, parallel={"zero": zero}, train=train_options)
    config.communication.compression.algorithm = algorithm
    config.communication.compression.ratio = 0.25
    config.communication.compression.min_elements = 64
    results = train(build(world, mesh, config), mesh, world.rank, range(6), config)
    losses, _, _ = reference(world, GPT)
    dense = configured(mesh, GPT)
    assert abs(results[0].loss - losses[0]) < 1e-5
    assert results[-1].axis_bytes["data"] < _predicted(world, mesh, dense).bytes["data"]
    assert math.isfinite(results[-1].loss) and results[-1].loss < losses[0]
    assert world.gather_objects([r.loss for r in results]) == [[r.loss for r in results]] * world.size


@pytest.mark.skipif(RANKS != 4 or FRAMEWORK != "torch", reason="TensorFlow traces a layer of an LSTM for seconds")
def test_a_recurrent_checkpoint_resumes_in_other_layouts(
    world: World, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = Path(world.broadcast_object(str(tmp_path_factory.mktemp("layouts")) if world.rank == 0 else None))
    losses, _, _ = reference(world, LSTM)
    mesh, zero = WRITER
    config = configured(mesh, LSTM, parallel={"zero": zero})
    first = build(world, mesh, config)
    train(first, mesh, world.rank, range(HALF), config)
    opened = open_checkpoint(save_checkpoint(folder, HALF, first.state(), {}, world, first.shards()))
    for mesh, zero in READERS[:2]:  # with stages and tensor ranks, and with data ranks
        config = configured(mesh, LSTM, parallel={"zero": zero})
        trainable = build(world, mesh, config)
        trainable.load_state(read_state(opened, trainable.shards(), world.rank, world.size))
        again = train(trainable, mesh, world.rank, range(HALF, STEPS), config)
        assert max(abs(r.loss - expected) for r, expected in zip(again, losses[HALF:], strict=True)) < TOLERANCE
