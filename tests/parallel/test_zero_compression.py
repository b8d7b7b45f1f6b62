"""ZeRO with compressed gradients and rounded parameters on real ranks, compared with equations in numpy."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_layouts as layouts
from test_compression import SHAPES, STEPS, TOLERANCE, UNBIASED, VECTOR, compression, gradients, make, run

import references
from builders import case, save_checkpoint
from hvdlm import plugins
from hvdlm.checkpoints.load import open_checkpoint, read_state
from hvdlm.communication.traffic import since, snapshot
from hvdlm.config import Config, ParallelConfig
from hvdlm.errors import HvdlmError
from hvdlm.models.spec import Init, ParamSpec
from hvdlm.parallel.flat_layout import FlatLayout, make_layout
from hvdlm.parallel.mesh import Mesh
from hvdlm.planning.zero_payloads import zero_payloads
from hvdlm.protocols.world import World
from launching import BACKEND, FRAMEWORK, RANKS

BY_BLOCKS = ("scaled_sign", "sign_majority", "qsgd", "int8", "int4")


@pytest.fixture(scope="session")
def manager() -> Any:
    return plugins.load([FRAMEWORK, "all_reduce", "compression"])


def layout(ranks: int, bucket_bytes: int = 10**9) -> FlatLayout:
    params = [ParamSpec(name, shape, ("a",) * len(shape), Init("zeros")) for name, shape in SHAPES.items()]
    return make_layout(params, bucket_bytes, align=ranks)


def opened(manager: Any, world: World, algorithm: str, gather: str = "fp32", stage: int = 1, **options: Any) -> Any:
    """Return an exchange over all ranks, opened for one bucket."""
    settings = compression(algorithm, **options)
    exchange = make(manager, world, parallel={"zero": stage, "zero_gather": gather}, compression=settings)
    flat = layout(world.size)
    exchange.open(flat, np.zeros(flat.size, np.float32))
    return exchange


def matrices(flat: FlatLayout) -> np.ndarray:
    """Return bool ``[size]``: the elements that are compressed, those of the bias and of the padding are not."""
    mask = np.zeros(flat.size, bool)
    for slot in flat.slots:
        mask[slot.start : slot.stop] = slot.name != "bias"
    return mask


def as_rows(values: np.ndarray, mask: np.ndarray, ranks: int, multiple: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return ``[..., ranks, width]``, what ``mask`` has of each shard of ``[..., size]``, and its indices there."""
    indices = [np.flatnonzero(shard) for shard in mask.reshape(ranks, -1)]
    width = -(-max(map(len, indices)) // multiple) * multiple
    rows = np.zeros((*values.shape[:-1], ranks, width), np.float32)
    shards = values.reshape(*values.shape[:-1], ranks, -1)
    for rank, own in enumerate(indices):
        rows[..., rank, : len(own)] = shards[..., rank, own]
    return rows, indices


def reference(algorithm: str, vectors: np.ndarray, rank: int, feedback: bool) -> np.ndarray:
    """Return the shards of ``rank``, ``[steps, size / ranks]``, of gradients ``[steps, ranks, size]``."""
    steps, ranks, size = vectors.shape
    blocks = algorithm in BY_BLOCKS
    rows, indices = as_rows(vectors, matrices(layout(ranks)), ranks, references.BLOCK if blocks else 1)
    real = as_rows(np.ones((1, size)), matrices(layout(ranks)), ranks, references.BLOCK if blocks else 1)[0] > 0
    result = vectors.sum(1).reshape(steps, ranks, -1)[:, rank]
    compress, error = getattr(references, algorithm), np.zeros_like(rows[0])
    for step in range(steps):
        corrected = rows[step] + error * feedback
        if blocks:  # of one block after the other, whichever shard it belongs to
            decoded, total = compress(corrected.reshape(ranks, -1), step)
            decoded, total = decoded.reshape(corrected.shape), total.reshape(ranks, -1)
        else:
            pairs = [compress(corrected[:, shard], step) for shard in range(ranks)]
            decoded, total = np.stack([own for own, _ in pairs], 1), np.stack([whole for _, whole in pairs])
        error = (corrected - decoded) * real[0]
        result[step, indices[rank]] = total[rank, : len(indices[rank])]
    return result


_SUMS: dict[tuple[str, int], np.ndarray] = {}  # by compressor and rank, which is a thread


def scattered(manager: Any, world: World, tensor: Any, algorithm: str) -> np.ndarray:
    """Return this rank's shards of the sums of ``gradients()``, which several tests examine."""
    key = algorithm, world.rank
    if key not in _SUMS:
        vectors = gradients(world.size, layout(world.size).size)
        _SUMS[key] = run(opened(manager, world, algorithm), world, tensor, vectors)
    return _SUMS[key]


@pytest.mark.parametrize("algorithm", VECTOR)
def test_scattered_sums_follow_the_papers_equations(manager: Any, world: World, tensor: Any, algorithm: str) -> None:
    vectors = gradients(world.size, layout(world.size).size)
    result = scattered(manager, world, tensor, algorithm)
    expected = reference(algorithm, vectors, world.rank, algorithm not in UNBIASED)
    assert result.shape == expected.shape
    tolerance = TOLERANCE.get(algorithm, 1e-5) * np.abs(expected).max()
    # A value on the border of two levels, or two values of equal size, may be rounded either way.
    outliers = np.abs(result - expected) > tolerance
    assert outliers.mean() < 4e-4, (outliers.sum(1), np.abs(result - expected).max())


@pytest.mark.parametrize("algorithm", ["int8", "top_k", "random_k", "scaled_sign"])
def test_nothing_is_lost_with_error_feedback(manager: Any, world: World, tensor: Any, algorithm: str) -> None:
    """What a shard's owner has received is the sum of all gradients but for the errors that the senders have of it."""
    flat = layout(world.size)
    vectors = gradients(world.size, flat.size)
    exchange = opened(manager, world, algorithm, error_feedback=True)
    received = run(exchange, world, tensor, vectors).sum(0)
    errors = {name.removeprefix("error/"): array for name, array in exchange.state().items()}
    mine = flat.flatten({"bias": np.zeros(60, np.float32), **errors})
    kept = np.sum(world.gather_objects(mine.tolist()), axis=0).reshape(world.size, -1)[world.rank]
    assert np.abs(kept).max() > 1e-3
    total = vectors.sum((0, 1)).reshape(world.size, -1)[world.rank]
    np.testing.assert_allclose(received + kept, total, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("algorithm", VECTOR)
def test_a_restored_state_of_shards_continues_bit_for_bit(
    manager: Any, world: World, tensor: Any, algorithm: str
) -> None:
    vectors = gradients(world.size, layout(world.size).size)
    first, second = (opened(manager, world, algorithm) for _ in range(2))
    expected = scattered(manager, world, tensor, algorithm)
    run(first, world, tensor, vectors[:2])
    state = first.state()
    assert (set(state) == {"error/wide", "error/tall"}) == (algorithm not in UNBIASED)
    second.load_state(state)
    np.testing.assert_array_equal(run(second, world, tensor, vectors[2:], 2), expected[2:])


def counted_cases() -> list[Any]:
    """Return every compressor with every gather: what one sends doesn't depend on the other."""
    cases = []
    for algorithm in [*VECTOR, "none"]:
        for gather in ["fp32", "bf16", "int8"]:
            kept = gather == "int8" or algorithm in ("int8", "none")
            cases.append(case(algorithm, gather, covered_by="" if kept else "this compressor with gather int8"))
    return cases


@pytest.mark.parametrize("algorithm, gather", counted_cases())
def test_counted_bytes_of_shards_are_the_planned_ones(
    manager: Any, world: World, tensor: Any, algorithm: str, gather: str
) -> None:
    exchange, flat = opened(manager, world, algorithm, gather), layout(world.size)
    before = snapshot(exchange.traffic)
    run(exchange, world, tensor, gradients(world.size, flat.size)[:1])
    exchange.gather([tensor(np.zeros(flat.size // world.size, np.float32))])
    sent = since(exchange.traffic, before)
    config = Config(parallel=ParallelConfig(zero=1, zero_gather=gather))
    config.communication.compression = compression(algorithm)
    (planned,) = zero_payloads(config, flat, world.size)
    counted = {name: entry.bytes for name, entry in sent.items()}
    assert all(entry.calls == 1 for entry in sent.values())
    parameters = {"parameters/all_gather": planned.parameters[world.rank]}
    if algorithm == "none":
        assert counted == parameters | {"gradients/reduce_scatter": planned.gradients}
    else:
        rest = {} if algorithm in ("fp16", "bf16") else {"gradients/all_reduce": 4 * 60}  # those compress the bias
        assert counted == parameters | {"gradients/all_to_all": planned.gradients} | rest
    if (world.size, algorithm, gather) == (2, "int8", "int8"):
        blocks = -(-2580 // 256)
        assert planned.gradients == 2 * 260 * blocks
        assert sum(planned.parameters) == 2 * 260 * blocks + 4 * 60


def rounded(values: np.ndarray, gather: str) -> np.ndarray:
    """Return parameters ``[size]`` as all ranks compute with them."""
    flat = layout(RANKS)
    mask, result = matrices(flat), values.copy()
    rows, indices = as_rows(values, mask, RANKS, references.BLOCK if gather == "int8" else 1)
    if gather == "bf16":
        decoded = references._bf16(rows)
    else:
        blocks = rows.reshape(-1, references.BLOCK)
        scales = np.abs(blocks).max(1, keepdims=True)
        decoded = (np.floor(blocks * (127 / np.maximum(scales, 1e-30)) + 0.5) * scales / 127).reshape(rows.shape)
    for rank, own in enumerate(indices):
        result.reshape(RANKS, -1)[rank, own] = decoded[rank, : len(own)]
    return result


@pytest.mark.parametrize("gather", ["bf16", "int8"])
@pytest.mark.parametrize("algorithm", ["none", "int8"])
def test_all_ranks_gather_the_same_rounded_parameters(
    manager: Any, world: World, tensor: Any, algorithm: str, gather: str
) -> None:
    flat = layout(world.size)
    values = np.random.default_rng(3).normal(size=flat.size).astype(np.float32)
    values[: flat.size // 3] *= 1e-3
    values[1000:1300] = 0.0
    own = values.reshape(world.size, -1)[world.rank]
    (result,) = opened(manager, world, algorithm, gather).gather([tensor(own.copy())])
    result = np.asarray(result)
    expected = rounded(values, gather)
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-9)
    assert 0 < np.abs(result - values).max() <= np.abs(values).max() * {"bf16": 2.0**-8, "int8": 1 / 253}[gather]
    np.testing.assert_array_equal(result[~matrices(flat)], values[~matrices(flat)])
    assert len(set(world.gather_objects(hashlib.sha256(result.tobytes()).hexdigest()))) == 1


def test_first_steps_and_small_buckets_of_zero_stay_dense(manager: Any, world: World, tensor: Any) -> None:
    vectors = gradients(world.size, layout(world.size).size)
    expected = vectors.sum(1).reshape(STEPS, world.size, -1)[:, world.rank]
    for options in ({"min_elements": 10_000}, {"min_compression": 200.0}, {"start_after_steps": STEPS}):
        exchange = opened(manager, world, "top_k", **options)
        before = snapshot(exchange.traffic)
        result = run(exchange, world, tensor, vectors)
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5, err_msg=str(options))
        assert set(since(exchange.traffic, before)) == {"gradients/reduce_scatter"}


def test_compressors_of_whole_gradients_are_refused_with_zero(manager: Any, world: World) -> None:
    for algorithm in ("power_sgd", "dgc", "chunked_top_k"):
        with pytest.raises(HvdlmError, match=f"{algorithm} doesn't go with parallel.zero 1"):
            opened(manager, world, algorithm)


MODEL = {**layouts.GPT, "layers": layouts.FEWEST_LAYERS, "bias": True}
# (ZeRO's stage, compressor, gather, micro-batch size): with one micro-batch, TensorFlow has one graph to trace.
TRAINED = [(1, "int8", None, None), (2, "int8", None, 2), (1, "none", "int8", None), (1, "top_k", "bf16", None)]
TRAINED = TRAINED if FRAMEWORK == "torch" else TRAINED[:2]
OTHERS = "the case of stage 2, which accumulates gradients too, and those of two ranks"
FEW = RANKS == 4 or FRAMEWORK == "tensorflow"
# TensorFlow would trace the graphs of a second trainable: tests/test_hybrid_runs.py resumes its runs in new processes.
COMPARED = FRAMEWORK == "torch" or "HVDLM_TEST_FULL" in os.environ
SELECTED = pytest.mark.skipif(RANKS != 2 and BACKEND != "threads", reason="one transport shows what all would")


def configured(stage: int, algorithm: str, gather: str | None, micro: int | None) -> Config:
    options = {"parallel": {"zero": stage, "zero_gather": gather}, "train": {"micro_batch_size": micro}}
    config = layouts.configured(Mesh(RANKS, 1, 1), MODEL, **options)
    config.communication.compression = compression(algorithm, ratio=0.25 if algorithm == "top_k" else None)
    return config


@SELECTED
@pytest.mark.parametrize(
    "case", [case(values, covered_by=OTHERS if FEW and values[0] == 1 else "") for values in TRAINED], ids=str
)
def test_training_and_its_restored_state_follow_the_plan(
    world: World, case: tuple[int, str, Any, int | None], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = Path(world.broadcast_object(str(tmp_path_factory.mktemp("zero")) if world.rank == 0 else None))
    mesh, config, half = Mesh(RANKS, 1, 1), configured(*case), layouts.STEPS // 2
    whole = layouts.build(world, mesh, config)
    first = layouts.train(whole, mesh, world.rank, range(half), config)
    state = whole.state()
    path = save_checkpoint(folder, half, state, {}, world, whole.shards())
    rest = layouts.train(whole, mesh, world.rank, range(half, layouts.STEPS), config)
    layouts.assert_traffic_is_predicted(world, mesh, config, rest)
    layouts.assert_memory_is_predicted(world, mesh, config, whole)
    assert rest[-1].loss < first[0].loss - 0.1
    assert_same_on_all_ranks(world, whole)

    ended, fingerprints = whole.state(), whole.fingerprints()
    stored = open_checkpoint(path)
    resumed = layouts.build(world, mesh, config) if COMPARED else whole
    resumed.load_state(read_state(stored, resumed.shards(), world.rank, world.size))
    assert_same_arrays(resumed.state(), state)
    assert_same_on_all_ranks(world, resumed)
    again = layouts.train(resumed, mesh, world.rank, range(half, layouts.STEPS), config)
    assert [r.loss for r in again] == [r.loss for r in rest]
    assert_same_arrays(resumed.state(), ended)
    assert resumed.fingerprints() == fingerprints

    # Without ZeRO, every rank has the float32 parameters whole.
    dense = layouts.build(world, mesh, configured(0, "none", None, case[3]))
    dense.load_state(read_state(stored, dense.shards(), world.rank, world.size))
    for name, shard in whole.shards().items():
        if name.startswith("parameters/"):
            values = dense.state()[name][shard.slices]
            np.testing.assert_array_equal(
                state[name], values if shard.flat is None else values.flat[slice(*shard.flat)]
            )
    if not COMPARED:
        return  # TensorFlow would trace other graphs, those that layouts without ZeRO are tested with
    close = layouts.train(dense, mesh, world.rank, range(half, layouts.STEPS), config)
    assert [r.loss for r in close] == pytest.approx([r.loss for r in rest], abs=0.1)


def assert_same_arrays(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


def assert_same_on_all_ranks(world: World, trainable: Any) -> None:
    fingerprints = world.gather_objects(trainable.fingerprints())
    assert fingerprints == [fingerprints[0]] * world.size
