"""Compression and rarer synchronisation on real ranks: held against the papers' equations in numpy."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import numpy as np
import pytest
import references
from parallel.conftest import FRAMEWORK

from hvdlm import plugins
from hvdlm.communication.traffic import by_axis, since, snapshot
from hvdlm.config import CommunicationConfig, CompressionConfig, Config, LocalConfig, ModelConfig, TrainConfig
from hvdlm.models.spec import Init, ParamSpec, builtin_models
from hvdlm.parallel.flat_layout import FlatLayout, make_layout
from hvdlm.parallel.mesh import make_mesh
from hvdlm.protocols.types import Batch
from hvdlm.protocols.world import World

# A matrix that is compressed, one that is not square, and a bias that stays dense.
SHAPES = {"wide": (40, 60), "bias": (60,), "tall": (90, 30)}
COUNTS = [40 * 60, 90 * 30]
STEPS = 4
VECTOR = ["fp16", "bf16", "top_k", "random_k", "scaled_sign", "sign_majority", "qsgd", "int8"]
UNBIASED = {"fp16", "bf16", "qsgd", "int8"}
ALGORITHMS = [*VECTOR, "power_sgd", "dgc"]
TOLERANCE = {"fp16": 2e-3, "bf16": 1e-2}  # of sums whose order differs from the reference's; others: 1e-5


@pytest.fixture(scope="session")
def manager() -> Any:
    return plugins.load([FRAMEWORK, "all_reduce", "compression", "local_sgd", "diloco"])


def layout() -> FlatLayout:
    return make_layout([ParamSpec(n, s, ("a",) * len(s), Init("zeros")) for n, s in SHAPES.items()], 10**9)


def make(manager: Any, world: World, name: str = "all_reduce", **options: Any) -> Any:
    """Return an exchange over all ranks."""
    config = Config(framework=FRAMEWORK, communication=CommunicationConfig(exchange=name, **options))
    config.train = TrainConfig(steps=STEPS, seed=1)
    more = {"compressors": plugins.compressors(manager), "index": world.rank}
    return plugins.make(manager, "exchange", name, group=world.group(range(world.size)), config=config, **more)


def compression(algorithm: str, **more: Any) -> CompressionConfig:
    extra: dict[str, Any] = {"momentum": 0.9, "clip": 3.0, "warmup": 2} if algorithm == "dgc" else {}
    return CompressionConfig(algorithm=algorithm, **{"block": references.BLOCK, **extra, **more})


def gradients(ranks: int, count: int) -> np.ndarray:
    """Return the gradients of all ranks, float32 ``[steps, ranks, count]``, the same on all of them."""
    random = np.random.default_rng(7)
    return (random.normal(size=(STEPS, ranks, count)) * random.random(count)).astype(np.float32)


def run(exchange: Any, world: World, tensor: Any, given: np.ndarray, first: int = 0) -> np.ndarray:
    """Return what the exchange makes of this rank's gradients, ``[steps, elements]``."""
    found = []
    for step, gradient in enumerate(given, first):
        exchange.begin(step)
        found.append(np.asarray(exchange.start(tensor(gradient[world.rank].copy()), 0).wait()).copy())
    return np.stack(found)


def reference(algorithm: str, given: np.ndarray) -> np.ndarray:
    """Return what the papers' equations make of it: ``[steps, elements]``; the bias is a plain sum."""
    places = {s.name: slice(s.start, s.stop) for s in layout().slots}
    ranks = given.shape[1]
    found = given.sum(1)
    sent = [slot for slot in layout().slots if slot.name != "bias"]
    if algorithm == "power_sgd":
        for slot in sent:
            matrices = given[:, :, places[slot.name]].reshape(len(given), ranks, *slot.shape)
            sums = references.with_feedback(references.PowerSGD(slot.shape, 4), matrices, True)
            found[:, places[slot.name]] = sums.reshape(len(given), -1)
        return found
    whole = np.concatenate([given[:, :, places[s.name]] for s in sent], axis=2)
    if algorithm == "dgc":
        sums = references.with_feedback(references.DGC(ranks, whole.shape[2], 0.9, 3.0, 2), whole, False)
    else:
        sums = references.with_feedback(getattr(references, algorithm), whole, algorithm not in UNBIASED)
    start = 0
    for slot in sent:
        size = slot.stop - slot.start
        found[:, places[slot.name]] = sums[:, start : start + size]
        start += size
    return found


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_sums_follow_the_papers_equations(manager: Any, world: World, tensor: Any, algorithm: str) -> None:
    exchange = make(manager, world, compression=compression(algorithm))
    exchange.open(layout(), np.zeros(layout().size, np.float32))
    given = gradients(world.size, layout().size)
    found, expected = run(exchange, world, tensor, given), reference(algorithm, given)
    tolerance = TOLERANCE.get(algorithm, 1e-5) * np.abs(expected).max()
    # A value that lies on the border of two levels (or two of equal size) may fall to either side.
    astray = np.abs(found - expected) > tolerance
    assert astray.mean() < 2e-4, (astray.sum(1), np.abs(found - expected).max())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_all_ranks_get_the_same_bits(manager: Any, world: World, tensor: Any, algorithm: str) -> None:
    exchange = make(manager, world, compression=compression(algorithm))
    exchange.open(layout(), np.zeros(layout().size, np.float32))
    found = run(exchange, world, tensor, gradients(world.size, layout().size))
    assert len(set(world.gather_objects(hashlib.sha256(found.tobytes()).hexdigest()))) == 1


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_state_taken_over_goes_on_bit_for_bit(manager: Any, world: World, tensor: Any, algorithm: str) -> None:
    given = gradients(world.size, layout().size)
    whole, first, second = (make(manager, world, compression=compression(algorithm)) for _ in range(3))
    for exchange in (whole, first, second):
        exchange.open(layout(), np.zeros(layout().size, np.float32))
    expected = run(whole, world, tensor, given)
    run(first, world, tensor, given[:2])
    second.load_state(first.state())
    np.testing.assert_array_equal(run(second, world, tensor, given[2:], 2), expected[2:])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_counted_bytes_are_those_of_the_payload(manager: Any, world: World, tensor: Any, algorithm: str) -> None:
    exchange = make(manager, world, compression=compression(algorithm, warmup=0, momentum=0.0, clip=0.0))
    exchange.open(layout(), np.zeros(layout().size, np.float32))
    before = snapshot(exchange.traffic)
    run(exchange, world, tensor, gradients(world.size, layout().size)[:1])
    n, blocks, dense = sum(COUNTS), -(-sum(COUNTS) // 256), 4 * 60
    part = 2 * -(-n // world.size)
    expected = {
        "fp16": 2 * n,
        "bf16": part * world.size + 4 * -(-part // 4),  # what is gathered is padded to whole words
        "top_k": 8 * round(0.01 * n),
        "random_k": 4 * round(0.1 * n),
        "scaled_sign": 4 * blocks + 256 // 8 * blocks,
        "sign_majority": 4 * blocks + 256 // 8 * blocks,
        "qsgd": 4 * blocks + 256 // 2 * blocks,
        "int8": 4 * blocks + 256 * blocks,
        "power_sgd": 4 * 4 * (40 + 60 + 90 + 30),
        "dgc": 8 * round(0.01 * n),
    }
    assert by_axis(since(exchange.traffic, before))["data"] == expected[algorithm] + dense


def test_what_does_not_gain_stays_dense(manager: Any, world: World, tensor: Any) -> None:
    given = gradients(world.size, layout().size)
    for options in ({"min_elements": 10_000}, {"min_compression": 200.0}, {"start_after_steps": STEPS}):
        exchange = make(manager, world, compression=compression("top_k", **options))
        exchange.open(layout(), np.zeros(layout().size, np.float32))
        found = run(exchange, world, tensor, given)
        np.testing.assert_allclose(found, given.sum(1), rtol=1e-5, atol=1e-5, err_msg=str(options))


def test_average_sum_and_predivide(manager: Any, world: World, tensor: Any) -> None:
    given = gradients(world.size, layout().size)
    for options, factor in (({}, 1), ({"reduction": "sum"}, world.size), ({"predivide": 8.0}, 1)):
        exchange = make(manager, world, **options)
        found = run(exchange, world, tensor, given)
        np.testing.assert_allclose(found, factor * given.sum(1), rtol=1e-5, atol=1e-5, err_msg=str(options))


def test_adasum_adds_orthogonal_gradients_and_averages_parallel_ones(world: World, manager: Any, tensor: Any) -> None:
    """Maleki et al. 2020, equation 3. A bucket holds the rank's share of the mean, so that the sum would be it."""
    if os.environ.get("HOROVOD_CPU_OPERATIONS") == "gloo":
        return  # refused before ranks meet: tests/test_bad_input.py
    exchange = make(manager, world, reduction="adasum")
    own = np.zeros(64, np.float32)
    own[world.rank] = 1.0
    found = np.asarray(exchange.start(tensor(own / world.size), 0).wait())
    np.testing.assert_allclose(found[: world.size], np.ones(world.size), atol=1e-5)
    same = np.linspace(-1, 1, 64).astype(np.float32)
    found = np.asarray(exchange.start(tensor(same / world.size), 0).wait())
    np.testing.assert_allclose(found, same, atol=1e-5)


def test_diloco_follows_the_papers_algorithm(manager: Any, world: World, tensor: Any) -> None:
    """Douillard et al. 2023, algorithm 1, with H = 2; the inner steps are this test's own."""
    flat, steps = layout(), 4
    start = np.linspace(-1, 1, flat.size).astype(np.float32)
    moves = gradients(world.size, flat.size)[:steps] * 0.01
    exchange = make(manager, world, "diloco", local=LocalConfig(2, 0.7, 0.9))
    exchange.open(flat, start)
    mine, anchor, velocity = start.copy(), start.astype(np.float64), np.zeros(flat.size)
    for step in range(steps):
        exchange.begin(step)
        mine = mine - moves[step, world.rank]
        replaced = exchange.finish(tensor(mine.copy()))
        assert (replaced is None) == (step % 2 == 0)
        if replaced is None:
            continue
        mine = np.asarray(replaced)
        difference = moves[step - 1 : step + 1].astype(np.float64).sum(0).mean(0)
        velocity = 0.9 * velocity + difference
        anchor = anchor - 0.7 * (difference + 0.9 * velocity)
        np.testing.assert_allclose(mine, anchor, atol=2e-6)


def test_local_sgd_averages_the_parameters(manager: Any, world: World, tensor: Any) -> None:
    """Stich 2019, algorithm 1."""
    flat = layout()
    exchange = make(manager, world, "local_sgd", local=LocalConfig(1))
    exchange.open(flat, np.zeros(flat.size, np.float32))
    everyones = gradients(world.size, flat.size)[0]
    exchange.begin(0)
    replaced = exchange.finish(tensor(everyones[world.rank].copy()))
    np.testing.assert_allclose(np.asarray(replaced), everyones.mean(0), atol=1e-6)


VARIANTS = {
    "dense": {},
    **{name: {"compression": CompressionConfig(algorithm=name)} for name in ALGORITHMS},
    "local_sgd": {"exchange": "local_sgd", "local": LocalConfig(3)},
    "diloco": {"exchange": "diloco", "local": LocalConfig(3)},
    "diloco with top_k": {
        "exchange": "diloco",
        "local": LocalConfig(3),
        "compression": CompressionConfig(algorithm="top_k"),
    },
}


def test_training_is_told_to_the_test_that_started_this(manager: Any, world: World) -> None:
    """Write each variant's losses and rank 0's parameters after each step for tests/test_launches.py.

    That compares frameworks and numbers of ranks.
    """
    found = {}
    for name, options in VARIANTS.items():
        config = Config(framework=FRAMEWORK, model=ModelConfig(layers=1, width=32, heads=2, initial_scale=0.2))
        # AdamW divides by a gradient's size: what is zero but for rounding (a key's bias; two ranks' signs that cancel)
        # would become a whole step. A larger epsilon leaves that to rounding.
        config.train = TrainConfig(steps=9, batch_size=8, warmup=0, seed=1, epsilon=1e-4)
        config.data.context = 12
        config.communication = CommunicationConfig(bucket_bytes=20_000, **options)
        spec = builtin_models()["gpt"](config.model, 50, 12)
        mesh = make_mesh(world.size, config.parallel)
        framework = plugins.make(manager, "framework", FRAMEWORK)
        exchange = make(manager, world, config.communication.exchange, bucket_bytes=20_000, **_options(options))
        trainable = framework.build(spec, mesh, world, exchange, config)
        losses, parameters = [], []
        share = 8 // world.size
        for step in range(9):
            tokens = np.random.default_rng(step).integers(0, 50, (8, 13)).astype(np.int32)
            own = Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy()).rows(world.rank * share, (world.rank + 1) * share)
            losses.append(trainable.train_step([own], 0.01, step).loss)
            held = sorted((key, value) for key, value in trainable.state().items() if key.startswith("parameters/"))
            parameters.append(np.concatenate([value.ravel() for _, value in held]))
        mean = np.mean(world.gather_objects(losses), axis=0)
        assert mean[-1] < mean[0], name
        found |= {f"{name}/losses": mean, f"{name}/parameters": np.stack(parameters)}
    if world.rank == 0 and "HVDLM_TEST_OUTPUT" in os.environ:
        np.savez(os.environ["HVDLM_TEST_OUTPUT"], **found)


def _options(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != "exchange"}
