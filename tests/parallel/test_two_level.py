"""Sums in two levels, of nodes of two ranks: whole within a node, compressed between nodes."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from test_compression import TOLERANCE, UNBIASED, compression, gradients, layout, run

import references
from builders import configured_spec, parameters, small_config, token_batch
from hvdlm import plugins
from hvdlm.communication.traffic import by_axis, since, snapshot
from hvdlm.config import CommunicationConfig, Config, ParallelConfig, TrainConfig
from hvdlm.parallel.mesh import make_mesh
from hvdlm.protocols.world import World
from launching import FRAMEWORK, RANKS

PER_NODE, SIZE = 2, 5160  # of the three tensors: 2700, 60 and 2400 elements in this order
# The elements of each rank's shard on a node that are compressed; pieces of few elements are not.
COMPRESSED = [(0, 2580), (180, 2580)]
ALGORITHMS = ["none", "fp16", "int8", "top_k", "dgc"]

pytestmark = pytest.mark.skipif(RANKS != 4, reason="two nodes of two ranks are four")


@pytest.fixture(scope="session")
def manager() -> Any:
    return plugins.load([FRAMEWORK, "all_reduce", "compression"])


def make(manager: Any, world: World, per_node: int = PER_NODE, train: TrainConfig | None = None, **options: Any) -> Any:
    """Return an exchange over all ranks."""
    config = Config(framework=FRAMEWORK, parallel=ParallelConfig(data_per_node=per_node))
    config.communication = CommunicationConfig(**options)
    config.train = train or TrainConfig(seed=1)
    return plugins.make_exchange(manager, config, world, world.group(range(world.size)))


def opened(manager: Any, world: World, algorithm: str) -> Any:
    exchange = make(manager, world, compression=compression(algorithm))
    exchange.open(layout(), np.zeros(SIZE, np.float32))
    return exchange


def reference(algorithm: str, vectors: np.ndarray) -> np.ndarray:
    """Return the papers' sums over nodes, whose ranks' gradients are added up first, ``[steps, elements]``."""
    steps, ranks = vectors.shape[:2]
    of_nodes = vectors.reshape(steps, ranks // PER_NODE, PER_NODE, SIZE).sum(2)
    shards = of_nodes.reshape(steps, ranks // PER_NODE, PER_NODE, SIZE // PER_NODE)
    total = shards.sum(1)
    for position, (start, stop) in enumerate(COMPRESSED if algorithm != "none" else []):
        sent = shards[:, :, position, start:stop]
        rule = references.DGC(sent.shape[1], stop - start, 0.9, 3.0, 2) if algorithm == "dgc" else None
        rule = rule or getattr(references, algorithm)
        total[:, position, start:stop] = references.with_feedback(rule, sent, algorithm not in {*UNBIASED, "dgc"})
    return total.reshape(steps, SIZE)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_nodes_sum_as_ranks_do_by_the_equations(manager: Any, world: World, tensor: Any, algorithm: str) -> None:
    vectors = gradients(world.size, SIZE)
    expected = reference(algorithm, vectors)
    result = run(opened(manager, world, algorithm), world, tensor, vectors)
    outliers = np.abs(result - expected) > TOLERANCE.get(algorithm, 1e-5) * np.abs(expected).max()
    assert outliers.mean() < 2e-4, (outliers.sum(1), np.abs(result - expected).max())
    # All ranks have the same bits.
    assert len(set(world.gather_objects(hashlib.sha256(result.tobytes()).hexdigest()))) == 1


@pytest.mark.parametrize("algorithm", ["int8", "top_k", "dgc"])
def test_a_restored_state_continues_bit_for_bit(manager: Any, world: World, tensor: Any, algorithm: str) -> None:
    vectors = gradients(world.size, SIZE)
    first, second = (opened(manager, world, algorithm) for _ in range(2))
    expected = run(first, world, tensor, vectors[:2])
    assert expected.shape == (2, SIZE)
    second.load_state(first.state())
    rest = [run(one, world, tensor, vectors[2:], 2) for one in (first, second)]
    np.testing.assert_array_equal(*rest)


def test_bytes_are_counted_by_level(manager: Any, world: World, tensor: Any) -> None:
    """Between nodes, a rank sends its shard alone: 8 bits for an element, and a float for a block, or all of it."""
    sent = {}
    for algorithm in ("none", "int8"):
        exchange = opened(manager, world, algorithm)
        before = snapshot(exchange.traffic)
        run(exchange, world, tensor, gradients(world.size, SIZE)[:1])
        sent[algorithm] = by_axis(since(exchange.traffic, before))
    position = world.rank % PER_NODE
    start, stop = COMPRESSED[position]
    blocks, dense = -(-(stop - start) // 256), SIZE // PER_NODE - (stop - start)
    assert {axes["node"] for axes in sent.values()} == {4 * SIZE + 4 * SIZE // PER_NODE}
    assert sent["none"]["data"] == 4 * SIZE // PER_NODE
    assert sent["int8"]["data"] == (256 + 4) * blocks + 4 * dense


def test_sums_and_divisions_are_those_of_one_level(manager: Any, world: World, tensor: Any) -> None:
    vectors = gradients(world.size, SIZE)
    for options, factor in (({}, 1), ({"reduction": "sum"}, world.size), ({"predivide": 8.0}, 1)):
        exchange = make(manager, world, **options)
        exchange.open(layout(), np.zeros(SIZE, np.float32))
        result = run(exchange, world, tensor, vectors)
        np.testing.assert_allclose(result, factor * vectors.sum(1), rtol=1e-5, atol=1e-5, err_msg=str(options))


def test_a_bucket_that_nodes_cannot_share_is_padded(manager: Any, world: World, tensor: Any) -> None:
    exchange = make(manager, world)
    exchange.open(layout(), np.zeros(SIZE, np.float32))
    vector = np.arange(61, dtype=np.float32) * (world.rank + 1)
    exchange.begin(0)
    result = np.asarray(exchange.start(tensor(vector), 0).wait())
    np.testing.assert_array_equal(result, 10 * np.arange(61, dtype=np.float32))


def test_a_model_trains_on_the_curve_of_one_level(manager: Any, world: World) -> None:
    """In buckets of several sizes, some of which are no multiples of a node's ranks."""
    curves, share = {}, 8 // world.size
    for per_node in (1, PER_NODE):
        config = small_config(FRAMEWORK, "rnn", layers=1, width=31)
        config.train = TrainConfig(steps=4, batch_size=8, warmup=0, seed=1)
        config.communication = CommunicationConfig(bucket_bytes=2000)
        config.parallel = ParallelConfig(data_per_node=per_node)
        mesh = make_mesh(world.size, config.parallel)
        exchange = make(manager, world, per_node, config.train, bucket_bytes=2000)
        framework = plugins.make(manager, "framework", FRAMEWORK)
        trainable = framework.build(configured_spec(config), mesh, world, exchange, config)
        losses = []
        for step in range(4):
            rows = token_batch(step, shape=(8, 4)).rows(world.rank * share, (world.rank + 1) * share)
            losses.append(trainable.train_step([rows], 0.01, step).loss)
        curves[per_node] = [losses, *(value for _, value in sorted(parameters(trainable).items()))]
    for one, two in zip(*curves.values(), strict=True):
        np.testing.assert_allclose(one, two, atol=2e-6)
