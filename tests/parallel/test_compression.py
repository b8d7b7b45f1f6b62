"""Gradient compression and local SGD on real ranks, compared with the papers' equations in numpy."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import references
from builders import configured_spec, parameters, small_config, token_batch
from hvdlm import plugins
from hvdlm.communication.traffic import by_axis, since, snapshot
from hvdlm.config import CommunicationConfig, CompressionConfig, Config, LocalConfig, ParallelConfig, TrainConfig
from hvdlm.models.spec import Init, ParamSpec
from hvdlm.parallel.flat_layout import FlatLayout, make_layout
from hvdlm.parallel.mesh import make_mesh
from hvdlm.protocols.world import World
from hvdlm.training.lr_schedule import make_schedule
from launching import FRAMEWORK

# Two matrices, which are compressed, and a bias, which stays dense.
SHAPES = {"wide": (40, 60), "bias": (60,), "tall": (90, 30)}
COUNTS = [40 * 60, 90 * 30]
STEPS = 4
TIME = 4  # TensorFlow and JAX trace and compile every variant anew: a few positions of a recurrent model are cheap
VECTOR = ["fp16", "bf16", "top_k", "random_k", "scaled_sign", "sign_majority", "qsgd", "int8", "int4"]
UNBIASED = {"fp16", "bf16", "qsgd", "int8"}
ALGORITHMS = [*VECTOR, "power_sgd", "dgc", "chunked_top_k"]
TOLERANCE = {"fp16": 2e-3, "bf16": 1e-2}  # of sums whose order differs from the reference's; others: 1e-5


@pytest.fixture(scope="session")
def manager() -> Any:
    exchanges = ["local_sgd", "diloco", "streaming_diloco", "one_bit_adam", "zero_one_adam", "demo"]
    return plugins.load([FRAMEWORK, "all_reduce", "compression", *exchanges])


def layout() -> FlatLayout:
    return make_layout(
        [ParamSpec(n, s, ("a",) * len(s), Init("zeros"), decay=len(s) > 1) for n, s in SHAPES.items()], 10**9
    )


def make(manager: Any, world: World, name: str = "all_reduce", train: TrainConfig | None = None, **options: Any) -> Any:
    """Return an exchange over all ranks."""
    parallel = ParallelConfig(**options.pop("parallel", {}))
    config = Config(framework=FRAMEWORK, parallel=parallel, communication=CommunicationConfig(exchange=name, **options))
    config.train = train or TrainConfig(steps=STEPS, seed=1)
    return plugins.make_exchange(manager, config, world, world.group(range(world.size)))


def compression(algorithm: str, **options: Any) -> CompressionConfig:
    extra: dict[str, Any] = {"dgc": {"momentum": 0.9, "clip": 3.0, "warmup": 2}, "chunked_top_k": {"error_decay": 0.8}}
    return CompressionConfig(algorithm=algorithm, **{"block": references.BLOCK, **extra.get(algorithm, {}), **options})


def gradients(ranks: int, count: int) -> np.ndarray:
    """Return the gradients of all ranks, float32 ``[steps, ranks, count]``, the same on all of them."""
    random = np.random.default_rng(7)
    return (random.normal(size=(STEPS, ranks, count)) * random.random(count)).astype(np.float32)


def run(exchange: Any, world: World, tensor: Any, vectors: np.ndarray, first: int = 0) -> np.ndarray:
    """Exchange the gradients of all ranks; return the results of this rank, ``[steps, elements]``."""
    results = []
    for step, gradient in enumerate(vectors, first):
        exchange.begin(step)
        results.append(np.asarray(exchange.start(tensor(gradient[world.rank].copy()), 0).wait()).copy())
    return np.stack(results)


def reference(algorithm: str, vectors: np.ndarray) -> np.ndarray:
    """Return the sums of the papers' equations, ``[steps, elements]``; the bias is summed uncompressed."""
    slices = {s.name: slice(s.start, s.stop) for s in layout().slots}
    ranks = vectors.shape[1]
    result = vectors.sum(1)
    compressed = [slot for slot in layout().slots if slot.name != "bias"]
    if algorithm == "power_sgd":
        for slot in compressed:
            matrices = vectors[:, :, slices[slot.name]].reshape(len(vectors), ranks, *slot.shape)
            sums = references.with_feedback(references.PowerSGD(slot.shape, 4), matrices, True)
            result[:, slices[slot.name]] = sums.reshape(len(vectors), -1)
        return result
    joined = np.concatenate([vectors[:, :, slices[s.name]] for s in compressed], axis=2)
    if algorithm == "dgc":
        sums = references.with_feedback(references.DGC(ranks, joined.shape[2], 0.9, 3.0, 2), joined, False)
    elif algorithm == "chunked_top_k":
        sums = references.with_feedback(references.ChunkedTopK(ranks, joined.shape[2], 4, 0.8), joined, False)
    else:
        sums = references.with_feedback(getattr(references, algorithm), joined, algorithm not in UNBIASED)
    start = 0
    for slot in compressed:
        size = slot.stop - slot.start
        result[:, slices[slot.name]] = sums[:, start : start + size]
        start += size
    return result


_SUMS: dict[tuple[str, int], np.ndarray] = {}  # by compressor and rank, which is a thread


def opened(manager: Any, world: World, algorithm: str) -> Any:
    """Return an exchange over all ranks with a compressor."""
    exchange = make(manager, world, compression=compression(algorithm))
    exchange.open(layout(), np.zeros(layout().size, np.float32))
    return exchange


def sums(manager: Any, world: World, tensor: Any, algorithm: str) -> np.ndarray:
    """Return this rank's sums of ``gradients()``, ``[steps, elements]``, which several tests examine."""
    key = algorithm, world.rank
    if key not in _SUMS:
        _SUMS[key] = run(opened(manager, world, algorithm), world, tensor, gradients(world.size, layout().size))
    return _SUMS[key]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_sums_follow_the_papers_equations(manager: Any, world: World, tensor: Any, algorithm: str) -> None:
    expected = reference(algorithm, gradients(world.size, layout().size))
    result = sums(manager, world, tensor, algorithm)
    tolerance = TOLERANCE.get(algorithm, 1e-5) * np.abs(expected).max()
    # A value on the border of two levels, or two values of equal size, may be rounded either way.
    outliers = np.abs(result - expected) > tolerance
    assert outliers.mean() < 2e-4, (outliers.sum(1), np.abs(result - expected).max())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_all_ranks_get_the_same_bits(manager: Any, world: World, tensor: Any, algorithm: str) -> None:
    result = sums(manager, world, tensor, algorithm)
    assert len(set(world.gather_objects(hashlib.sha256(result.tobytes()).hexdigest()))) == 1


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_restored_state_continues_bit_for_bit(manager: Any, world: World, tensor: Any, algorithm: str) -> None:
    vectors = gradients(world.size, layout().size)
    expected = sums(manager, world, tensor, algorithm)
    first, second = (opened(manager, world, algorithm) for _ in range(2))
    run(first, world, tensor, vectors[:2])
    second.load_state(first.state())
    np.testing.assert_array_equal(run(second, world, tensor, vectors[2:], 2), expected[2:])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_counted_bytes_equal_the_payload_size(manager: Any, world: World, tensor: Any, algorithm: str) -> None:
    exchange = make(manager, world, compression=compression(algorithm, warmup=0, momentum=0.0, clip=0.0))
    exchange.open(layout(), np.zeros(layout().size, np.float32))
    before = snapshot(exchange.traffic)
    run(exchange, world, tensor, gradients(world.size, layout().size)[:1])
    n, blocks, dense = sum(COUNTS), -(-sum(COUNTS) // 256), 4 * 60
    expected = {
        "fp16": 2 * n + 2 * 60 - dense,  # which compresses the bias, too
        "bf16": 2 * n + 2 * 60 - dense,
        "top_k": 8 * round(0.01 * n),
        "random_k": 4 * round(0.1 * n),
        "scaled_sign": 4 * blocks + 256 // 8 * blocks,
        "sign_majority": 4 * blocks + 256 // 8 * blocks,
        "qsgd": 4 * blocks + 256 // 2 * blocks,
        "int8": 4 * blocks + 256 * blocks,
        "int4": 4 * blocks + 256 // 2 * blocks,
        "power_sgd": 4 * 4 * (40 + 60 + 90 + 30),
        "dgc": 8 * round(0.01 * n),
        "chunked_top_k": (2 * 4 + 4 * 12 // 8 + 4 * 2 // 8) * blocks,
    }
    assert by_axis(since(exchange.traffic, before))["data"] == expected[algorithm] + dense


@pytest.mark.skipif(FRAMEWORK != "torch", reason="tensors of other frameworks can't be overwritten")
@pytest.mark.parametrize("algorithm", ["fp16", "bf16", "power_sgd"])
def test_sums_are_computed_in_memory_that_exists(manager: Any, world: World, tensor: Any, algorithm: str) -> None:
    exchange = opened(manager, world, algorithm)
    errors = [variable.value for _, kind, variable in exchange._variables() if kind == "error"]
    before = [error.data_ptr() for error in errors]
    bucket = tensor(gradients(world.size, layout().size)[0, world.rank].copy())
    exchange.begin(0)
    assert exchange.start(bucket, 0).wait().data_ptr() == bucket.data_ptr()
    assert [error.data_ptr() for error in errors] == before and all(error.any() for error in errors)
    assert len(errors) == (2 if algorithm == "power_sgd" else 0)


def test_tensors_that_gain_nothing_stay_dense(manager: Any, world: World, tensor: Any) -> None:
    vectors = gradients(world.size, layout().size)
    for options in ({"min_elements": 10_000}, {"min_compression": 200.0}, {"start_after_steps": STEPS}):
        exchange = make(manager, world, compression=compression("top_k", **options))
        exchange.open(layout(), np.zeros(layout().size, np.float32))
        result = run(exchange, world, tensor, vectors)
        np.testing.assert_allclose(result, vectors.sum(1), rtol=1e-5, atol=1e-5, err_msg=str(options))


@pytest.mark.parametrize("rows", [4, 8, 400])
def test_power_sgd_makes_orthonormal_columns(tensor: Any, rows: int) -> None:
    """As Gram-Schmidt does, with zeros in place of columns that depend on those before them."""
    from hvdlm_compression.power_sgd import orthogonal

    matrix = np.random.default_rng(2).normal(size=(rows, 4)).astype(np.float32)
    matrix[:, 1] = 3 * matrix[:, 0]
    scaled = matrix * np.float32([1e-12, 1e-12, 1.0, 1e12])
    for case_of, zero in (
        (matrix, 1),
        (scaled, 1),
        (matrix * np.float32([1, 0, 1, 1]), 1),
        (matrix[:, [2, 0, 3, 1]], 3),
    ):
        columns = np.asarray(orthogonal(tensor(np.ascontiguousarray(case_of))))
        kept = [index for index in range(4) if index != zero]
        np.testing.assert_allclose(columns.T @ columns, np.diag([index != zero for index in range(4)]), atol=1e-5)
        own = columns.T @ case_of
        assert (np.diag(own)[kept] > 0).all() and (np.abs(np.tril(own, -1)) <= 1e-5 * np.abs(case_of).max(0)).all()
        np.testing.assert_allclose((columns @ own)[:, kept], case_of[:, kept], rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(np.asarray(orthogonal(tensor(np.zeros((rows, 4), np.float32)))), 0.0)
    for few in (1, 3):  # rows, fewer than columns, which min_compression 0 compresses, too
        columns = np.asarray(orthogonal(tensor(np.random.default_rng(3).normal(size=(few, 4)).astype(np.float32))))
        np.testing.assert_allclose(columns.T @ columns, np.diag(np.arange(4) < few), atol=1e-5)


def test_reduction_options_average_sum_and_predivide(manager: Any, world: World, tensor: Any) -> None:
    vectors = gradients(world.size, layout().size)
    for options, factor in (({}, 1), ({"reduction": "sum"}, world.size), ({"predivide": 8.0}, 1)):
        exchange = make(manager, world, **options)
        result = run(exchange, world, tensor, vectors)
        np.testing.assert_allclose(result, factor * vectors.sum(1), rtol=1e-5, atol=1e-5, err_msg=str(options))


def test_adasum_sums_orthogonal_and_averages_parallel_gradients(world: World, manager: Any, tensor: Any) -> None:
    """Maleki et al. 2020, equation 3; buckets hold gradients divided by the number of ranks."""
    if os.environ.get("HOROVOD_CPU_OPERATIONS") == "gloo":
        pytest.skip("Gloo has no Adasum: it is refused before ranks meet (tests/test_bad_input.py)")
    exchange = make(manager, world, reduction="adasum")
    unit = np.zeros(64, np.float32)
    unit[world.rank] = 1.0
    result = np.asarray(exchange.start(tensor(unit / world.size), 0).wait())
    np.testing.assert_allclose(result[: world.size], np.ones(world.size), atol=1e-5)
    same = np.linspace(-1, 1, 64).astype(np.float32)
    result = np.asarray(exchange.start(tensor(same / world.size), 0).wait())
    np.testing.assert_allclose(result, same, atol=1e-5)


def test_diloco_follows_the_papers_algorithm(manager: Any, world: World, tensor: Any) -> None:
    """Douillard et al. 2023, algorithm 1, with H = 2 and given inner steps."""
    flat, steps = layout(), 4
    start = np.linspace(-1, 1, flat.size).astype(np.float32)
    moves = gradients(world.size, flat.size)[:steps] * 0.01
    exchange = make(manager, world, "diloco", local=LocalConfig(2, 0.7, 0.9))
    exchange.open(flat, start)
    values, anchor, velocity = start.copy(), start.astype(np.float64), np.zeros(flat.size)
    for step in range(steps):
        exchange.begin(step)
        values = values - moves[step, world.rank]
        replaced = exchange.finish(tensor(values.copy()))
        assert (replaced is None) == (step % 2 == 0)
        if replaced is None:
            continue
        values = np.asarray(replaced)
        difference = moves[step - 1 : step + 1].astype(np.float64).sum(0).mean(0)
        velocity = 0.9 * velocity + difference
        anchor = anchor - 0.7 * (difference + 0.9 * velocity)
        np.testing.assert_allclose(values, anchor, atol=2e-6)


def test_local_sgd_averages_the_parameters(manager: Any, world: World, tensor: Any) -> None:
    """Stich 2019, algorithm 1."""
    flat = layout()
    exchange = make(manager, world, "local_sgd", local=LocalConfig(1))
    exchange.open(flat, np.zeros(flat.size, np.float32))
    all_values = gradients(world.size, flat.size)[0]
    exchange.begin(0)
    replaced = exchange.finish(tensor(all_values[world.rank].copy()))
    np.testing.assert_allclose(np.asarray(replaced), all_values.mean(0), atol=1e-6)


ADAM = TrainConfig(steps=STEPS, beta1=0.9, beta2=0.8, epsilon=1e-6, warmup=0, seed=1)


def one_bit_adam(manager: Any, world: World, start_after_steps: int = 2, **train: Any) -> Any:
    options = compression("none", start_after_steps=start_after_steps)
    exchange = make(manager, world, "one_bit_adam", train=replace(ADAM, **train), compression=options)
    exchange.open(layout(), np.zeros(layout().size, np.float32))
    return exchange


def test_one_bit_adam_follows_the_papers_algorithm(manager: Any, world: World, tensor: Any) -> None:
    """Tang et al. 2021, algorithm 1: two steps of Adam, then two of compressed momentum; the bias stays dense."""
    vectors = gradients(world.size, layout().size)
    result = run(one_bit_adam(manager, world), world, tensor, vectors / world.size)
    expected = np.zeros_like(result)
    compressed = np.concatenate([np.arange(s.start, s.stop) for s in layout().slots if s.name != "bias"])
    dense = np.setdiff1d(np.arange(layout().size), compressed)
    settings = (ADAM.beta1, ADAM.beta2, ADAM.epsilon, 2)
    expected[:, compressed] = references.one_bit_adam(vectors[:, :, compressed], *settings)
    expected[:, dense] = references.one_bit_adam(vectors[:, :, dense], *settings, compresses=False)
    outliers = np.abs(result - expected) > 1e-4 * np.abs(expected).max()
    assert outliers.mean() < 1e-3, (outliers.sum(1), np.abs(result - expected).max())
    assert len(set(world.gather_objects(hashlib.sha256(result.tobytes()).hexdigest()))) == 1


def test_one_bit_adam_takes_no_huge_step_for_a_rare_token(manager: Any, world: World, tensor: Any) -> None:
    """A second moment of zero, or nearly so, would divide the scale of a whole block."""
    vectors = gradients(world.size, layout().size)
    vectors[:2, :, :20], vectors[:2, :, 20:40] = 0.0, vectors[:2, :, 20:40] * 1e-4
    stage = run(one_bit_adam(manager, world), world, tensor, vectors / world.size)[2:]
    assert np.abs(stage).max() <= 1.0
    assert (np.abs(stage[:, :40]) > 0.99).all()  # they do move


def test_a_restored_one_bit_adam_continues_bit_for_bit(manager: Any, world: World, tensor: Any) -> None:
    vectors = gradients(world.size, layout().size)
    for done in (1, 3):  # in both stages
        whole, first, second = (one_bit_adam(manager, world) for _ in range(3))
        expected = run(whole, world, tensor, vectors)
        run(first, world, tensor, vectors[:done])
        second.load_state(first.state())
        np.testing.assert_array_equal(run(second, world, tensor, vectors[done:], done), expected[done:])
    # Without a state, as on another number of ranks, both stages come again.
    second.open(layout(), np.zeros(layout().size, np.float32))
    np.testing.assert_array_equal(run(second, world, tensor, vectors, 100), expected)


def test_one_bit_adam_compresses_when_its_variance_is_stable(manager: Any, world: World, tensor: Any) -> None:
    """Gradients of one size: the second moment of beta2 0.8 grows by less than 4% from step 15 to step 20."""
    exchange, late = one_bit_adam(manager, world, 0), one_bit_adam(manager, world, 0, steps=23, warmup=0.95)
    vectors = np.repeat(gradients(world.size, layout().size)[:1], 23, axis=0)
    phases, sent, of_late = [], [], []
    for step in range(23):
        before = snapshot(exchange.traffic)
        phases.append(exchange.begin(step))
        exchange.start(tensor(vectors[step, world.rank].copy()), 0).wait()
        sent.append(by_axis(since(exchange.traffic, before))["data"])
        of_late.append(late.begin(step))
        late.start(tensor(vectors[step, world.rank].copy()), 0).wait()
    assert of_late == ["adam"] * 23  # a warm-up of 22 steps, given as a share of all
    assert phases == ["adam"] * 20 + ["compressed"] * 3
    n, dense = sum(COUNTS), 4 * 60
    blocks = -(-n // (256 * world.size)) * world.size
    assert sent[19] == 4 * n + dense
    assert sent[20] == blocks * 36 + blocks * 36 // world.size + dense


# The rate is the peak's half from step 20 on, and its quarter from step 30 on.
FALLING = TrainConfig(
    steps=40, learning_rate=0.01, warmup=0, schedule="linear", min_learning_rate=0.0, beta2=0.9, epsilon=1e-6,
    weight_decay=0.0, seed=1,
)  # fmt: skip
PHASES = ["adam"] * 17 + ["compressed", "adam", "compressed"]


def zero_one_adam(manager: Any, world: World, **train: Any) -> Any:
    options = {"train": replace(FALLING, **train), "local": LocalConfig(4), "compression": compression("none")}
    exchange = make(manager, world, "zero_one_adam", **options)
    exchange.open(layout(), np.zeros(layout().size, np.float32))
    return exchange


def descend(
    exchange: Any, world: World, tensor: Any, vectors: np.ndarray, values: np.ndarray, first: int = 0, decay: float = 0
) -> tuple[list[str], list[int], np.ndarray]:
    """Do steps of SGD from ``values``; return phases, bytes and this rank's parameters of every step."""
    phases, sent, trajectory = [], [], []
    for step, gradient in enumerate(vectors, first):
        before, rate = snapshot(exchange.traffic), np.float32(make_schedule(FALLING)(step))
        phases.append(exchange.begin(step))
        direction = np.asarray(exchange.start(tensor(gradient[world.rank] / world.size), 0).wait())
        loss, tokens = np.asarray(exchange.start_metrics(tensor(np.array([world.rank, 2.0]))).wait())
        ranks = [world.rank] * world.size if phases[-1] == "local" else range(world.size)
        assert (loss, tokens) == (sum(ranks), 2.0 * world.size)
        values = values - rate * (direction + decay * layout().decay_mask() * values)
        replaced = exchange.finish(tensor(values.astype(np.float32)))
        assert (replaced is None) == (phases[-1] != "sync") and exchange.agreed == (phases[-1] != "local")
        values = values.astype(np.float32) if replaced is None else np.asarray(replaced).copy()
        sent.append(by_axis(since(exchange.traffic, before)).get("data", 0))
        trajectory.append(values)
    return phases, sent, np.stack(trajectory)


def many_gradients(ranks: int, steps: int) -> np.ndarray:
    """Return gradients of one mean, ``[steps, ranks, elements]``."""
    random = np.random.default_rng(11)
    mean = random.normal(size=layout().size)
    return (mean + random.normal(size=(steps, ranks, layout().size))).astype(np.float32)


def test_zero_one_adam_follows_the_papers_algorithm(manager: Any, world: World, tensor: Any) -> None:
    """Lu et al. 2022, algorithm 1 and section 6: 16 variances in a row, every second one, then ranks by themselves."""
    vectors = many_gradients(world.size, FALLING.steps)
    start = np.zeros(layout().size, np.float32)
    phases, sent, result = descend(zero_one_adam(manager, world), world, tensor, vectors, start)
    assert phases[:20] == PHASES
    assert phases[20:] == ["local", "sync"] * 6 + ["local", "local", "local", "sync"] * 2
    expected = np.zeros((FALLING.steps, world.size, layout().size))
    rates = [make_schedule(FALLING)(step) for step in range(FALLING.steps)]
    settings = (rates, phases, FALLING.beta1, FALLING.beta2, FALLING.epsilon)
    for compresses in (True, False):
        own = np.concatenate([np.arange(s.start, s.stop) for s in layout().slots if (s.name != "bias") == compresses])
        expected[:, :, own] = references.zero_one_adam(vectors[:, :, own], *settings, compresses=compresses)
    outliers = np.abs(result - expected[:, world.rank]) > 1e-4 * np.abs(expected).max()
    assert outliers.mean() < 1e-3, (outliers.sum(1), np.abs(result - expected[:, world.rank]).max())
    digests = [hashlib.sha256(values.tobytes()).hexdigest() for values in result]
    for step, each in enumerate(zip(*world.gather_objects(digests), strict=True)):
        assert len(set(each)) == (world.size if phases[step] == "local" else 1), step
    blocks = -(-sum(COUNTS) // (references.BLOCK * world.size)) * world.size
    compressed = blocks * 36 + blocks * 36 // world.size + 4 * 60 + 16
    counts = {"adam": 4 * layout().size + 16, "compressed": compressed, "sync": compressed, "local": 0}
    assert sent == [counts[phase] for phase in phases]


def test_zero_one_adam_takes_no_huge_step_for_a_rare_token(manager: Any, world: World, tensor: Any) -> None:
    """Steps of a rank's own are bounded, too."""
    vectors = many_gradients(world.size, 26)
    vectors[:20, :, :20], vectors[:20, :, 20:40] = 0.0, vectors[:20, :, 20:40] * 1e-4
    phases, _, trajectory = descend(zero_one_adam(manager, world), world, tensor, vectors, np.zeros(layout().size))
    assert phases[20:] == ["local", "sync"] * 3
    steps = np.abs(np.diff(trajectory[19::2], axis=0))
    assert steps.max() <= 2 * 0.005 * 1.01 and (steps[:, :40] > 0.004).any()


@pytest.mark.parametrize("name", ["one_bit_adam", "zero_one_adam"])
def test_an_infinite_gradient_makes_no_finite_direction(manager: Any, world: World, tensor: Any, name: str) -> None:
    """The norm of the direction is how a run notices a step that it has to skip."""
    exchange = one_bit_adam(manager, world) if name == "one_bit_adam" else zero_one_adam(manager, world)
    vectors = many_gradients(world.size, 20)
    bias = next(slot for slot in layout().slots if slot.name == "bias")
    vectors[-1, 0, bias.start] = np.inf
    for step, gradient in enumerate(vectors):
        exchange.begin(step)
        direction = np.asarray(exchange.start(tensor(gradient[world.rank].copy()), 0).wait())
        assert np.isfinite(direction).all() == (step < 19), step


def test_zero_one_adam_decays_weights_alike_on_all_ranks(manager: Any, world: World, tensor: Any) -> None:
    """A round of several steps decays the parameters from which it began by the sum of its rates."""
    vectors = many_gradients(world.size, 22)
    values = np.ones(layout().size, np.float32)
    plain, decayed = (zero_one_adam(manager, world, weight_decay=decay) for decay in (0.0, 0.5))
    for exchange in (plain, decayed):
        exchange.open(layout(), values)
    phases, _, moved = descend(plain, world, tensor, vectors, values)
    _, _, result = descend(decayed, world, tensor, vectors, values, decay=0.5)
    assert phases[20:] == ["local", "sync"]
    before, expected, total = values, values.astype(np.float64), 0.0
    for step, phase in enumerate(phases):
        total += make_schedule(FALLING)(step)
        if phase != "local":
            expected += moved[step] - before - total * 0.5 * layout().decay_mask() * expected
            before, total = moved[step], 0.0
    np.testing.assert_allclose(result[-1], expected, atol=1e-5)
    assert np.abs(result[-1] - moved[-1]).max() > 0.05
    assert len(set(world.gather_objects(hashlib.sha256(result[-1].tobytes()).hexdigest()))) == 1


def test_a_restored_zero_one_adam_continues_bit_for_bit(manager: Any, world: World, tensor: Any) -> None:
    vectors = many_gradients(world.size, FALLING.steps)
    values = np.zeros(layout().size, np.float32)
    _, _, expected = descend(zero_one_adam(manager, world), world, tensor, vectors, values)
    first, begun = zero_one_adam(manager, world), 0
    for done in (18, 24):  # between two updates of the second moment, and between two rounds
        _, _, trajectory = descend(first, world, tensor, vectors[begun:done], values, begun)
        values, begun, second = trajectory[-1], done, zero_one_adam(manager, world)
        second.open(layout(), values)
        second.load_state(first.state())
        _, _, rest = descend(second, world, tensor, vectors[done:], values, done)
        np.testing.assert_array_equal(rest, expected[done:])
    second.open(layout(), values)  # as on another number of ranks, without a state
    phases, _, _ = descend(second, world, tensor, vectors[22:], values, 22)
    assert phases == ["adam"] * 16 + ["local", "sync"]


@pytest.mark.parametrize("ranks_differ", [False, True])
def test_demo_follows_the_papers_algorithm(manager: Any, world: World, tensor: Any, ranks_differ: bool) -> None:
    """Peng et al. 2024, algorithm 1; the bias is summed whole."""
    vectors = gradients(world.size, layout().size)
    if not ranks_differ:
        vectors = np.repeat(vectors[:, :1], world.size, axis=1)
    options = compression("none", momentum=0.9, ratio=0.005)
    exchange = make(manager, world, "demo", compression=options)
    exchange.open(layout(), np.zeros(layout().size, np.float32))
    before = snapshot(exchange.traffic)
    result = run(exchange, world, tensor, vectors / world.size)
    assert by_axis(since(exchange.traffic, before))["data"] == STEPS * (4 * 20 * (1 + 2) + 4 * 60)
    for slot in layout().slots:
        own = vectors[:, :, slot.start : slot.stop]
        if slot.name == "bias":
            expected = np.sign(references.momenta(own.mean(1), 0.9))
        else:
            expected = references.demo(own.reshape(STEPS, world.size, *slot.shape), 0.9, 20).reshape(STEPS, -1)
        # Values near zero, and components of nearly equal size, may fall on either side.
        assert (result[:, slot.start : slot.stop] != expected).mean() < 5e-3, slot.name
    assert len(set(world.gather_objects(hashlib.sha256(result.tobytes()).hexdigest()))) == 1


def test_a_restored_demo_continues_bit_for_bit(manager: Any, world: World, tensor: Any) -> None:
    vectors = gradients(world.size, layout().size)
    whole, first, second = (make(manager, world, "demo", compression=compression("none")) for _ in range(3))
    for exchange in (whole, first, second):
        exchange.open(layout(), np.zeros(layout().size, np.float32))
    expected = run(whole, world, tensor, vectors)
    run(first, world, tensor, vectors[:2])
    second.load_state(first.state())
    np.testing.assert_array_equal(run(second, world, tensor, vectors[2:], 2), expected[2:])


VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    **{name: {"compression": CompressionConfig(algorithm=name)} for name in ALGORITHMS},
    "local_sgd": {"exchange": "local_sgd", "local": LocalConfig(3)},
    "diloco": {"exchange": "diloco", "local": LocalConfig(3)},
    "diloco with top_k": {
        "exchange": "diloco",
        "local": LocalConfig(3),
        "compression": CompressionConfig(algorithm="top_k"),
    },
    "local_sgd with chunked_top_k": {
        "exchange": "local_sgd",
        "local": LocalConfig(3),
        "compression": CompressionConfig(algorithm="chunked_top_k", block=1024, ratio=0.25),
    },
    "streaming_diloco": {"exchange": "streaming_diloco", "local": LocalConfig(3, overlap=1)},
    "streaming_diloco with int4": {
        "exchange": "streaming_diloco",
        "local": LocalConfig(3, overlap=2),
        "compression": CompressionConfig(algorithm="int4"),
    },
    "one_bit_adam": {
        "exchange": "one_bit_adam",
        "compression": CompressionConfig(start_after_steps=4),
        "train": {"optimizer": "sgd", "momentum": 0.0, "clip": 0.0},
    },
    # All four kinds of steps: the second moment has settled when the rate halves, after 20.
    "zero_one_adam": {
        "exchange": "zero_one_adam",
        "local": LocalConfig(2),
        "train": {"optimizer": "sgd", "momentum": 0.0, "clip": 0.0, "steps": 24, "beta2": 0.9, "schedule": "step"}
        | {"learning_rate": 0.01, "decay_start": 20, "decay_every": 100, "decay_factor": 0.5},
    },
    "zero with int8": {"parallel": {"zero": 1}, "compression": CompressionConfig(algorithm="int8")},
    "zero with top_k": {
        "parallel": {"zero": 1, "zero_gather": "bf16"},
        "compression": CompressionConfig(algorithm="top_k"),
    },
    # Of a few steps, whose directions have elements of -1 and 1.
    "demo": {"exchange": "demo", "train": {"optimizer": "sgd", "momentum": 0.0, "clip": 0.0}, "rate": 0.002},
}


# The example of a framework has no ``advance`` and saves what it computes with: exchanges that need more are refused
# (tests/test_jax_example.py).
SUPPORTED = [name for name in VARIANTS if FRAMEWORK != "jax" or not name.startswith(("streaming", "zero"))]
if FRAMEWORK == "tensorflow" and "HVDLM_TEST_FULL" not in os.environ:
    # Whose graphs have no operations but those of the others: fp16, the exchange and the compressor by themselves.
    ALIKE = ("bf16", "diloco with top_k", "local_sgd with chunked_top_k", "zero with top_k")
    SUPPORTED = [name for name in SUPPORTED if name not in ALIKE]
CHOSEN = os.environ.get("HVDLM_TEST_EXCHANGES", ",".join(SUPPORTED)).split(",")


def test_losses_of_every_exchange_are_written_and_fall(manager: Any, world: World) -> None:
    """Write the losses of every variant, or of those chosen, and rank 0's parameters after each step.

    tests/test_launches.py compares them between frameworks and numbers of ranks.
    """
    curves = {}
    for name in CHOSEN:
        config, trainable = build(manager, world, VARIANTS[name])
        losses, weights = steps(config, trainable, world, range(config.train.steps))
        mean = np.mean(world.gather_objects(losses), axis=0)
        assert mean[-1] < mean[0] - 0.1, (name, mean)
        curves |= {f"{name}/losses": mean, f"{name}/parameters": np.stack(weights)}
    if world.rank == 0 and "HVDLM_TEST_OUTPUT" in os.environ:
        np.savez(os.environ["HVDLM_TEST_OUTPUT"], **curves)


def build(manager: Any, world: World, options: dict[str, Any]) -> tuple[Any, Any]:
    """Return the configuration of one of ``VARIANTS``, and a model to train with it."""
    config = small_config(FRAMEWORK, "rnn", layers=1, width=32)
    # AdamW divides by a gradient's size, so that gradients of rounding errors alone (a key's bias; cancelling signs
    # of two ranks) would become full steps. A larger epsilon keeps them small.
    own, rate, parallel = options.get("train", {}), options.get("rate", 0.01), options.get("parallel", {})
    options = {key: value for key, value in options.items() if key not in ("train", "rate", "parallel")}
    own = {"steps": 9, "learning_rate": rate, "schedule": "constant"} | own
    config.train = TrainConfig(batch_size=8, warmup=0, seed=1, epsilon=1e-4, **own)
    config.communication = CommunicationConfig(bucket_bytes=20_000, **options)
    config.parallel = ParallelConfig(**parallel)
    mesh = make_mesh(world.size, config.parallel)
    framework = plugins.make(manager, "framework", FRAMEWORK)
    context = {"parallel": parallel, "bucket_bytes": 20_000, **_options(options)}
    exchange = make(manager, world, config.communication.exchange, config.train, **context)
    return config, framework.build(configured_spec(config), mesh, world, exchange, config)


def steps(config: Any, trainable: Any, world: World, numbers: range) -> tuple[list[float], list[np.ndarray]]:
    """Do these steps; return this rank's losses, and its parameters after each step."""
    losses, weights, share, rates = [], [], 8 // world.size, make_schedule(config.train)
    for step in numbers:
        rows = token_batch(step % 4, shape=(8, TIME)).rows(world.rank * share, (world.rank + 1) * share)
        losses.append(trainable.train_step([rows], rates(step), step).loss)
        weights.append(np.concatenate([value.ravel() for _, value in sorted(parameters(trainable).items())]))
    return losses, weights


@pytest.mark.parametrize("name", ["local_sgd", "diloco", "zero_one_adam"])
def test_a_rank_that_stops_within_a_round_continues_it(manager: Any, world: World, name: str) -> None:
    """A checkpoint has rank 0's parameters and optimizer state; what other ranks have of their own is beside them."""
    options = {**VARIANTS[name], "local": LocalConfig(4)} if name != "zero_one_adam" else VARIANTS[name]
    config, whole = build(manager, world, options)
    expected = steps(config, whole, world, range(config.train.steps))
    stop = 6 if name != "zero_one_adam" else 21
    first, second = (build(manager, world, options)[1] for _ in range(2))
    steps(config, first, world, range(stop))
    state = first.state()
    for key, array in state.items():
        if key.startswith(("parameters/", "optimizer/")):
            read = np.frombuffer(world.broadcast_bytes(array.tobytes(), 0), array.dtype)
            state[key] = read.reshape(array.shape).copy()
    second.load_state(state)
    losses, weights = steps(config, second, world, range(stop, config.train.steps))
    assert losses == expected[0][stop:]
    np.testing.assert_array_equal(weights, expected[1][stop:])
    own = world.gather_objects(hashlib.sha256(expected[1][stop - 1].tobytes()).hexdigest())
    assert len(set(own)) == world.size  # it was within a round


RESTORED = ["top_k"]  # TensorFlow traces each variant twice
if FRAMEWORK == "torch":
    biased = [algorithm for algorithm in ALGORITHMS if algorithm not in UNBIASED]
    RESTORED = [*biased, "zero with top_k", "one_bit_adam", "demo"]


@pytest.mark.skipif(FRAMEWORK == "jax", reason="the example of a framework restores nothing")
@pytest.mark.parametrize("name", RESTORED)
def test_a_skipped_step_leaves_no_trace(manager: Any, world: World, name: str) -> None:
    """Of gradients that are not finite on one rank, and of a norm above the limit: error feedback and momentum stay."""
    algorithm = {"compression": CompressionConfig(algorithm=name, momentum=0.9 if name == "dgc" else 0.0)}
    options, last = VARIANTS.get(name, algorithm), 8 if name == "one_bit_adam" else 4
    share = 8 // world.size

    def step(trainable: Any, number: int, limit: float = math.inf, weight: float = 1.0) -> Any:
        rows = token_batch(number % 4, shape=(8, TIME)).rows(world.rank * share, (world.rank + 1) * share)
        weights = np.full(rows.inputs.shape, weight, np.float32)
        return trainable.train_step([replace(rows, weights=weights, reset=True)], 0.01, number, limit)

    def state(trainable: Any) -> dict[str, np.ndarray]:
        return {name: array for name, array in trainable.state().items() if not name.startswith("carry/")}

    whole, trainable = (build(manager, world, options)[1] for _ in range(2))
    for number in range(last):
        assert step(whole, number).applied
    for number in range(last - 2):
        step(trainable, number)
    before = state(trainable)
    assert any(array.any() for name, array in before.items() if name.startswith("exchange/"))
    for limit, weight in ((math.inf, math.nan if world.rank == world.size - 1 else 1.0), (1e-9, 1.0)):
        result = step(trainable, last - 2, limit, weight)
        assert result.bad and result.failed == (limit == math.inf)
        after = state(trainable)
        assert after.keys() == before.keys()
        for name, array in before.items():
            np.testing.assert_array_equal(after[name], array, err_msg=name)
    for number in range(last - 2, last):
        assert step(trainable, number).applied
    for name, array in state(whole).items():
        np.testing.assert_array_equal(state(trainable)[name], array, err_msg=name)


@pytest.mark.skipif(FRAMEWORK != "torch", reason="decided in Python alone; TensorFlow traces every phase twice")
def test_ranks_that_agree_again_do_so_in_a_skipped_step(manager: Any, world: World) -> None:
    """With 0/1 Adam, every rank continues from the parameters and the momentum of all."""
    built = [build(manager, world, VARIANTS["zero_one_adam"]) for _ in range(2)]
    rows = token_batch(3, shape=(8, TIME)).rows(world.rank * (8 // world.size), (world.rank + 1) * (8 // world.size))
    for (config, trainable), limit in zip(built, (math.inf, 1e-9), strict=True):
        steps(config, trainable, world, range(21))
        assert any(name.startswith("exchange/since_sync/") for name in trainable.state())  # step 21 ends the interval
        result = trainable.train_step([replace(rows, reset=True)], 0.005, 21, limit)
        assert result.skipped == (limit < 1.0)
    applied, skipped = (trainable.state() for _, trainable in built)
    assert applied.keys() == skipped.keys() and not any("since_sync" in name for name in skipped)
    for name, array in applied.items():
        np.testing.assert_array_equal(skipped[name], array, err_msg=name)
    moments = [array for name, array in skipped.items() if name.startswith("exchange/first_moment/")]
    own = world.gather_objects(hashlib.sha256(np.concatenate(moments, axis=None).tobytes()).hexdigest())
    assert len(set(own)) == 1


def _options(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != "exchange"}
