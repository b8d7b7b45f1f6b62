"""The work of a step, by which its seconds are predicted, against closed forms and the compressors themselves."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest

from hvdlm import plugins
from hvdlm.config import (
    CommunicationConfig,
    CompressionConfig,
    Config,
    LocalConfig,
    ModelConfig,
    ParallelConfig,
    TrainConfig,
)
from hvdlm.configuration import validation
from hvdlm.errors import HvdlmError
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.mesh import Mesh, make_mesh
from hvdlm.planning.closed_forms import Habits, closed_form
from hvdlm.planning.gradient_work import kept_bytes, work_of
from hvdlm.planning.hardware import Hardware, Link, Rates
from hvdlm.planning.payloads import payload
from hvdlm.planning.step_time import predict_time
from hvdlm.planning.work import Collective, Work
from hvdlm_language.presets import PRESETS
from launching import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from planner_configurations import NETWORKS, TABLES
from planner_worker import make_config

CONTEXT, VOCAB = 32, 96


def made(
    name: str,
    mesh: tuple[int, int, int],
    sequence: bool = False,
    zero: int = 0,
    compressed: str = "none",
    per_node: int = 1,
    **train: Any,
) -> Config:
    config = Config(model=ModelConfig(name=name, layers=4, width=64, heads=4))
    config.train = TrainConfig(**{"batch_size": 16, "micro_batch_size": 2} | train)
    config.data.context = CONTEXT
    config.parallel = ParallelConfig(*mesh, per_node, sequence=sequence, zero=zero)  # type: ignore[arg-type]
    config.communication.bucket_bytes = 40_000
    config.communication.compression.algorithm = compressed
    return config


def spec_of(config: Config) -> ModelSpec:
    return PRESETS[config.model.name](config.model, VOCAB, CONTEXT)


def make_mesh_of(config: Config) -> Mesh:
    parallel = config.parallel
    return Mesh(parallel.data or 1, parallel.pipeline, parallel.tensor, parallel.data_per_node)


def works(config: Config, habits: Habits | None = None) -> list[Work]:
    """Return the work of every rank of one copy of the model."""
    mesh = make_mesh_of(config)
    every = [work_of(config, spec_of(config), mesh, rank, habits) for rank in range(mesh.pipeline * mesh.tensor)]
    return [work for work in every if work is not None]


@pytest.mark.parametrize("name", ["gpt", "llama", "qwen3", "neox", "gemma", "rnn", "gru", "lstm"])
@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)])
def test_flops_of_all_ranks_are_those_of_the_model(name: str, mesh: tuple[int, int, int]) -> None:
    config = made(name, mesh)
    spec = spec_of(config)
    tokens = config.train.batch_size * CONTEXT // mesh[0]
    attention = 12.0 * 4 * 64 * CONTEXT if spec.kind == "gpt" else 0.0
    products = [p for work in works(config) for one in (work.forward, work.backward) for p in one.products]
    flops = works(config)[0].micro_batches * sum(product.flops for product in products)
    assert flops == pytest.approx((spec.flops_per_token - attention) * tokens)
    heads = sum(a.flops for work in works(config) for a in work.forward.attention) * works(config)[0].micro_batches
    assert heads == pytest.approx(attention * tokens / 3 / 2)  # one of three passes, of which causality leaves half


LAYOUTS = [
    ("gpt", (2, 1, 1), {}),
    ("gpt", (2, 1, 1), {"zero": 1}),
    ("gpt", (2, 1, 1), {"zero": 2}),
    ("gpt", (2, 1, 1), {"zero": 3}),
    ("gpt", (2, 1, 2), {"zero": 3, "sequence": True}),
    ("gpt", (4, 1, 1), {"zero": 1, "compressed": "int8"}),
    ("gpt", (2, 1, 1), {"zero": 2, "compressed": "bf16"}),
    ("llama", (1, 1, 2), {}),
    ("qwen3", (1, 1, 2), {}),
    ("qwen3", (2, 2, 2), {"sequence": True}),
    ("gpt", (1, 1, 2), {"sequence": True}),
    ("gpt", (1, 1, 2), {"activation_checkpointing": True}),
    ("gpt", (1, 1, 2), {"sequence": True, "activation_checkpointing": True}),
    ("lstm", (1, 1, 2), {}),
    ("gpt", (2, 2, 2), {"zero": 1, "sequence": True}),
    ("gpt", (4, 1, 2), {"per_node": 2}),
    ("gpt", (6, 1, 1), {"per_node": 3, "batch_size": 12}),
]


@pytest.mark.parametrize("name, mesh, options", LAYOUTS, ids=str)
@pytest.mark.parametrize("habits", [Habits(), Habits(recomputes_all=True)], ids=["torch", "tensorflow"])
def test_collectives_hand_over_the_predicted_bytes(
    name: str, mesh: tuple[int, int, int], options: dict[str, Any], habits: Habits
) -> None:
    config = made(name, mesh, **options)
    for rank, work in enumerate(works(config, habits)):
        # The shards that ZeRO's data ranks gather may differ in size.
        replicas = [rank + data * mesh[1] * mesh[2] for data in range(mesh[0])]
        every = [closed_form(config, spec_of(config), make_mesh_of(config), replica, habits) for replica in replicas]
        known = [one.bytes for one in every if one is not None and one.bytes is not None]
        assert len(known) == mesh[0]
        stage = rank // mesh[2]
        neighbours = (stage > 0) + (stage < mesh[1] - 1)
        mean = {axis: sum(sizes[axis] for sizes in known) / mesh[0] for axis in known[0]}
        assert handed(work, mesh, neighbours, config.parallel.data_per_node) == pytest.approx(mean, abs=1)


def handed(work: Work, mesh: tuple[int, int, int], neighbours: int, per_node: int) -> dict[str, float]:
    """Return the bytes that a step hands to collectives, by axis: of an all-gather, the rank's own shard."""
    sizes = dict(zip(("data", "pipeline", "tensor"), mesh, strict=True)) | {
        "ends": 2,
        "model": mesh[1] * mesh[2],
        "node": per_node,
    }
    totals: dict[str, float] = {}

    def add(collectives: tuple[Collective, ...], times: float = 1.0) -> None:
        for c in collectives:
            shard = sizes[c.axis] if c.operation == "all_gather" else 1
            axis = {"ends": "pipeline", "between": "data"}.get(c.axis, c.axis)
            totals[axis] = totals.get(axis, 0.0) + times * c.count * c.bytes / shard

    for one in (work.forward, work.backward):
        add(one.blocking + one.gathers, work.micro_batches)
        add(tuple(beside.collective for beside in one.overlapped), work.micro_batches)
    for bucket in work.buckets:
        add(bucket.collectives, work.micro_batches if work.scatters_every else 1.0)
        add(bucket.later)
    add(work.after)
    # Activations and their gradients, to and from neighbours.
    add((Collective("send", work.send_bytes, "pipeline", 2.0 * neighbours),), work.micro_batches)
    return {axis: size for axis, size in totals.items() if size}


@pytest.mark.parametrize(
    "name",
    ["fp16", "bf16", "int8", "int4", "qsgd", "scaled_sign", "sign_majority", "top_k", "dgc", "chunked_top_k"],
)
@pytest.mark.parametrize("count", [1024, 5000])
def test_payloads_are_those_of_the_compressors(name: str, count: int) -> None:
    from hvdlm_compression.plugin import hvdlm_compressors

    settings = CompressionConfig(algorithm=name)
    compressor = hvdlm_compressors()[name](settings, 1, 0, 2)
    assert payload(settings, (count,), 2).bytes == compressor.payload_bytes((count,))


@pytest.mark.parametrize("name", ["random_k", "power_sgd"])
def test_payloads_of_sums_are_those_of_the_compressors(name: str) -> None:
    from hvdlm_compression.plugin import hvdlm_compressors

    settings, shape = CompressionConfig(algorithm=name), ((96, 64) if name == "power_sgd" else (5000,))
    compressor = hvdlm_compressors()[name](settings, 1, 0, 2)
    planned = payload(settings, shape, 2)
    assert planned.bytes == compressor.payload_bytes(shape) and planned.operation == "all_reduce"


def test_compressed_buckets_send_payloads_and_what_stays_dense() -> None:
    config = made("gpt", (2, 1, 1))
    config.communication.compression = CompressionConfig(algorithm="int8")
    (work,) = works(config)
    dense = closed_form(made("gpt", (2, 1, 1)), spec_of(config), Mesh(2, 1, 1), 0)
    assert dense is not None and dense.bytes is not None
    sent = sum(c.bytes / (2 if c.operation == "all_gather" else 1) for b in work.buckets for c in b.collectives)
    assert 0.25 < sent / dense.bytes["data"] < 0.3
    assert sum(bucket.received for bucket in work.buckets) == 2 * sum(bucket.compressed for bucket in work.buckets)


def test_power_sgd_sends_second_factors_after_the_backward_pass() -> None:
    config = made("gpt", (2, 1, 1))
    config.communication.compression = CompressionConfig(algorithm="power_sgd")
    (work,) = works(config)
    compressed = [bucket for bucket in work.buckets if bucket.compressed]
    # With the first factors, what stays dense is summed: one collective a bucket.
    dense = sum(4 * (bucket.elements - bucket.compressed) for bucket in compressed)
    first = sum(c.bytes for bucket in compressed for c in bucket.collectives)
    second = sum(c.bytes for bucket in compressed for c in bucket.later)
    assert all(len(bucket.collectives) == 1 for bucket in compressed)
    assert compressed and first == pytest.approx(second + dense)


def test_two_levels_compress_one_gradient_of_a_node() -> None:
    one, two = (made("gpt", (8, 1, 1), compressed="int8", per_node=per_node) for per_node in (1, 4))
    (levels,), (flat,) = works(two), works(one)
    between = [c for bucket in levels.buckets for c in bucket.collectives if c.axis == "between"]
    gathered = [c.bytes for bucket in flat.buckets for c in bucket.collectives if c.operation == "all_gather"]
    # Two payloads of a quarter each in place of eight whole ones; a few quarters are too small to be compressed.
    assert sum(c.bytes for c in between if c.operation == "all_gather") == pytest.approx(sum(gathered) / 16, rel=0.1)
    assert [c.axis for c in levels.buckets[0].later] == ["node"]
    kept = [kept_bytes(replace_algorithm(config, "top_k"), make_mesh_of(config), 4000.0) for config in (one, two)]
    assert kept == [8000.0, 2000.0]


def replace_algorithm(config: Config, algorithm: str) -> Config:
    compression = CompressionConfig(algorithm=algorithm)
    return replace(config, communication=replace(config.communication, compression=compression))


def test_two_levels_are_faster_where_the_network_is_slow() -> None:
    seconds = {}
    for network in (1e7, 1e11):
        links = {"node": Link(1e-6, 1e10), "network": Link(1e-5, network)}
        hardware = Hardware("test", "", "", (Rates(1e11, 1e10),), links, ranks_per_node=4)
        for per_node in (1, 4):
            config = made("gpt", (8, 1, 1), per_node=per_node)
            time = predict_time(config, spec_of(config), make_mesh_of(config), hardware)
            assert time is not None
            seconds[network, per_node] = time.seconds
    assert seconds[1e7, 4] < 0.8 * seconds[1e7, 1]
    assert seconds[1e11, 4] > seconds[1e11, 1]


@pytest.mark.parametrize("exchange", ["diloco", "streaming_diloco"])
def test_local_sgd_sends_in_one_of_many_steps(exchange: str) -> None:
    config = made("gpt", (2, 1, 1))
    config.communication = CommunicationConfig(exchange=exchange, local=LocalConfig(steps=10))
    (work,) = works(config)
    assert not work.buckets and not work.after
    size = sum(4 * param.size for param in spec_of(config).params)
    assert sum(c.bytes * c.count for c in work.rounds) == pytest.approx(size / 10)
    assert work.streams == (exchange == "streaming_diloco")


def test_a_bucket_is_ready_when_its_first_layer_is() -> None:
    (work,) = works(made("gpt", (2, 1, 1)))
    ready = [bucket.ready for bucket in work.buckets]
    assert ready == sorted(ready, reverse=True) and ready[-1] == 0
    assert [segment.name for segment in work.segments] == ["embed", *(f"layers.{i}" for i in range(4)), "head"]


def test_other_architectures_have_no_known_work() -> None:
    config = made("convnet", (1, 1, 1))
    spec = ModelSpec("convnet", spec_of(made("gpt", (1, 1, 1))).settings, (), 0.0)
    assert work_of(config, spec, Mesh(1, 1, 1), 0) is None


@pytest.mark.parametrize("table", TABLES)
def test_the_ranks_of_a_table_can_train_what_it_asks_for(table: str) -> None:
    """A table that is written before it is measured is known to be possible then."""
    refused = []
    for group, configurations in TABLES[table].items():
        for name, options in configurations.items():
            config = make_config(options, "torch", 1)
            try:
                validation.values(config)
                validation.layout(config, make_mesh(2 if group in NETWORKS else int(group), config.parallel))
                validation.model(config, plugins.load([config.model.name]))
            except HvdlmError as error:
                refused.append(f"{name}: {error}")
    assert refused == []
