"""Sharding, pipeline stages and schedules, and memory predictions, compared with closed forms."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import NEWER, model_spec, single_rank_trainable, token_batch
from hvdlm.config import Config, ModelConfig, ParallelConfig, TrainConfig
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.mesh import Mesh, make_mesh
from hvdlm.parallel.pipeline_schedules import make_pipeline_schedule
from hvdlm.parallel.pipeline_stages import cut_into_stages, layer_flops
from hvdlm.parallel.sharding_rules import bounds, make_model_shard
from hvdlm.planning.activations import kept_micro_batches
from hvdlm.planning.closed_forms import closed_form, idle_share
from hvdlm_language.presets import PRESETS
from launching import ROOT, run_python


def four_layers(name: str = "gpt", vocab: int = 51, **sizes: Any) -> ModelSpec:
    """Return the description of a model of four layers."""
    return model_spec(name, vocab, 16, **{"layers": 4, "width": 32, "heads": 4} | sizes)


@given(st.sampled_from([1, 2, 4]), st.integers(1, 4), st.sampled_from(["gpt", "qwen3", "lstm"]), st.integers(40, 60))
@settings(max_examples=30, deadline=None)
def test_every_element_counts_on_exactly_one_rank(tensor: int, pipeline: int, name: str, vocab: int) -> None:
    model, mesh = four_layers(name, vocab, kv_heads=2), Mesh(1, pipeline, tensor)
    counts = {p.name: np.zeros(p.shape, int) for p in model.params}
    for rank in range(mesh.size):
        for param in make_model_shard(model, mesh, rank, ParallelConfig(1, pipeline, tensor)).params:
            counts[param.spec.name][param.shard.slices] += param.counted
    assert all((count == 1).all() for count in counts.values())


def test_shard_sizes_differ_by_at_most_one() -> None:
    for length, count in ((51, 4), (8, 8), (7, 3)):
        ranges = [bounds(length, count, index) for index in range(count)]
        assert ranges[0][0] == 0 and ranges[-1][1] == length
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
        assert max(b - a for a, b in ranges) - min(b - a for a, b in ranges) <= 1


def test_initial_values_equal_slices_of_the_unsharded_model() -> None:
    model = four_layers("llama", kv_heads=2)
    whole = model.initial(7)
    for rank in range(4):
        for param in make_model_shard(model, Mesh(1, 1, 4), rank, ParallelConfig(1, 1, 4)).params:
            values = param.spec.initial_box(7, param.shard.slices)
            np.testing.assert_array_equal(values, whole[param.spec.name][param.shard.slices])


def test_stages_are_cut_by_the_cost_of_their_layers_and_head() -> None:
    model = four_layers(vocab=20_000, layers=8)
    costs, head = layer_flops(model)
    stages = cut_into_stages(model, 2)
    assert sum((stage.layers for stage in stages), ()) == tuple(range(8))
    slowest = max(sum(costs[i] for i in s.layers) + (head if s.last else 0) for s in stages)
    others = [max(sum(costs[:end]), sum(costs[end:]) + head) for end in range(1, 8)]
    assert slowest == min(others)
    assert len(stages[0].layers) > 4  # because of the cost of the head


@given(st.integers(1, 6), st.integers(1, 9), st.sampled_from(["gpipe", "1f1b"]))
@settings(deadline=None)
def test_no_schedule_deadlocks(stages: int, micro_batches: int, name: str) -> None:
    """Sends are asynchronous and receives block, as in the plugins."""
    queues = [list(make_pipeline_schedule(name, stage, stages, micro_batches)) for stage in range(stages)]
    done: set[tuple[int, str, int]] = set()
    moved = True
    while moved:
        moved = False
        for stage, queue in enumerate(queues):
            while queue:
                kind, n, _ = queue[0]
                needs = (stage - 1, kind, n) if kind == "forward" else (stage + 1, kind, n)
                outside = not 0 <= needs[0] < stages
                if not (outside or needs in done) or (kind == "backward" and (stage, "forward", n) not in done):
                    break
                done.add((stage, kind, n))
                queue.pop(0)
                moved = True
    assert not any(queues)


@given(st.integers(2, 5), st.integers(2, 4), st.integers(1, 4), st.sampled_from([(1, 1), (1, 2), (3, 5)]))
@settings(deadline=None)
def test_interleaved_stages_shrink_the_bubble(stages: int, virtual: int, groups: int, seconds: tuple[int, int]) -> None:
    """Passes of equal chunks, simulated by the dependencies of the virtual stages (Narayanan et al. 2021, 2.2)."""
    count = groups * stages
    queues = [list(make_pipeline_schedule("1f1b", s, stages, count, virtual)) for s in range(stages)]
    for stage, queue in enumerate(queues):
        expected = itertools.product(("forward", "backward"), range(count), range(virtual))
        assert sorted(queue) == sorted(expected)
        alive = itertools.accumulate(1 if action.kind == "forward" else -1 for action in queue)
        assert max(alive) == min(2 * (stages - stage - 1) + (virtual - 1) * stages + 1, count * virtual)
    ends: dict[tuple[int, str, int], int] = {}  # by virtual stage, kind and micro-batch
    clock, moved = [0] * stages, True
    while moved:
        moved = False
        for stage, queue in enumerate(queues):
            while queue:
                kind, n, chunk = queue[0]
                number, forward = chunk * stages + stage, kind == "forward"
                before, outside = (number - 1, number == 0) if forward else (number + 1, number == stages * virtual - 1)
                needed = [] if outside else [(before, kind, n)]
                needed += [] if forward else [(number, "forward", n)]
                if not all(one in ends for one in needed):
                    break
                clock[stage] = max([clock[stage], *(ends[one] for one in needed)]) + seconds[not forward]
                ends[number, kind, n] = clock[stage]
                queue.pop(0)
                moved = True
    assert not any(queues)  # no deadlock
    ideal = count * virtual * sum(seconds)
    assert (max(clock) - ideal) * virtual * count == (stages - 1) * ideal
    assert idle_share(stages, count, virtual) == pytest.approx((max(clock) - ideal) / max(clock))


@given(st.sampled_from([1, 2]), st.integers(2, 3), st.integers(2, 3), st.booleans())
@settings(max_examples=10, deadline=None)
def test_virtual_stages_share_the_layers_out_in_turn(tensor: int, pipeline: int, virtual: int, tied: bool) -> None:
    model = four_layers(layers=pipeline * virtual + 1, tie_embeddings=tied)
    mesh, options = Mesh(1, pipeline, tensor), ParallelConfig(1, pipeline, tensor, virtual_stages=virtual)
    counts = {p.name: np.zeros(p.shape, int) for p in model.params}
    order: dict[int, tuple[int, ...]] = {}
    for rank in range(mesh.size):
        shard = make_model_shard(model, mesh, rank, options)
        for param in shard.params:
            counts[param.spec.name][param.shard.slices] += param.counted
        held = [param for chunk in shard.chunks for param in chunk.params]
        assert held == list(shard.params) and len(shard.chunks) == virtual  # buckets fill as backward passes end
        for chunk in shard.chunks:
            assert chunk.stage.number % pipeline == mesh.coordinates(rank)["pipeline"]
            order[chunk.stage.number] = chunk.layers
    assert all((count == 1).all() for count in counts.values())
    assert sum((order[number] for number in sorted(order)), ()) == tuple(range(pipeline * virtual + 1))


def test_the_1f1b_schedule_keeps_few_micro_batches() -> None:
    assert [kept_micro_batches("1f1b", stage, 4, 16) for stage in range(4)] == [4, 3, 2, 1]
    assert [kept_micro_batches("gpipe", stage, 4, 16) for stage in range(4)] == [16] * 4
    for name, stages, stage, count in itertools.product(("1f1b", "gpipe"), (4,), range(4), (1, 2, 3, 7)):
        actions = make_pipeline_schedule(name, stage, stages, count)
        alive = itertools.accumulate(1 if action.kind == "forward" else -1 for action in actions)
        assert kept_micro_batches(name, stage, stages, count) == max(alive)
    assert idle_share(4, 16) == 3 / 19 and idle_share(1, 5) == 0
    for stage in range(4):
        order = [n for kind, n, _ in make_pipeline_schedule("1f1b", stage, 4, 16) if kind == "backward"]
        assert order == list(range(16))


def configured(mesh: tuple[int, int, int], model: str = "gpt", **train: Any) -> Config:
    config = Config(model=ModelConfig(name=model))
    config.train = TrainConfig(**{"batch_size": 8, "micro_batch_size": 2} | train)
    config.data.context = 16
    config.parallel = ParallelConfig(*mesh)
    return config


def test_predicted_memory_has_a_closed_form() -> None:
    model = four_layers(bias=False, tie_embeddings=False, vocab=52)
    layer, ends = 12 * 32 * 32 + 2 * 32, (52 + 16) * 32 + 52 * 32 + 32
    assert model.parameters == 4 * layer + ends

    def memory(mesh: tuple[int, int, int], rank: int = 0, zero: int = 0) -> dict[str, int]:
        config = configured(mesh)
        config.parallel.zero = zero  # type: ignore[assignment]
        prediction = closed_form(config, model, Mesh(*mesh), rank)
        assert prediction is not None
        return {kind: count // 4 for kind, count in prediction.memory.items()}

    single = memory((1, 1, 1))
    assert single["parameters"] == single["gradients"] == single["optimizer"] // 2 == model.parameters
    tensor = memory((1, 1, 4))
    assert tensor["parameters"] == 4 * (3 * 32 * 32 + 2 * 32) + (13 + 13 + 16) * 32 + 32
    assert memory((1, 4, 1), 1)["parameters"] == layer
    size = 4 * math.ceil(model.parameters / 4)
    assert memory((4, 1, 1), zero=1)["optimizer"] == 2 * size // 4
    assert memory((4, 1, 1), zero=1)["gradients"] == size + size // 4
    assert memory((4, 1, 1), zero=2)["gradients"] <= size + size // 4


@pytest.mark.parametrize("name", ["gpt", "llama", *NEWER, "rnn", "gru", "lstm"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_predicted_activations_are_near_what_torch_keeps(name: str, recomputed: bool) -> None:
    config = configured((1, 1, 1), name, micro_batch_size=None, activation_checkpointing=recomputed)
    config.model = ModelConfig(name=name, layers=3, width=64, heads=4, **NEWER.get(name, {}))
    model, mesh = PRESETS[name](config.model, 97, 16), Mesh(1, 1, 1)
    trainable = single_rank_trainable(model, config)
    trainable.train_step([token_batch(shape=(8, 16), vocab=97)], 1e-3, 0)
    predicted = closed_form(config, model, mesh, 0)
    assert predicted is not None
    assert predicted.memory["activations"] == pytest.approx(trainable.memory()["activations"], rel=0.10)


TERMS: list[dict[str, Any]] = [{"dropout": 0.1}, {"label_smoothing": 0.1}, {"z_loss": 1e-4}]
TERMS.append({name: value for term in TERMS for name, value in term.items()})


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize(
    ("name", "half"),
    [("gpt", False), ("gpt", True), ("llama", False), ("llama", True), ("rnn", False), ("gru", False), ("lstm", False)],
)
def test_dropout_and_terms_of_the_loss_are_predicted(name: str, half: bool, recomputed: bool) -> None:
    """Measured with and without: the difference is that of the predictions, to the byte."""

    def activations(term: dict[str, Any]) -> list[int]:
        train = {key: value for key, value in term.items() if key != "dropout"}
        train |= {"micro_batch_size": None, "activation_checkpointing": recomputed}
        train |= {"precision": "bf16"} if half else {}
        config = configured((1, 1, 1), name, **train)
        config.model = ModelConfig(name=name, layers=3, width=64, heads=4, dropout=term.get("dropout", 0.0))
        model = PRESETS[name](config.model, 97, 16)
        trainable = single_rank_trainable(model, config)
        trainable.train_step([token_batch(shape=(8, 16), vocab=97)], 1e-3, 0)
        predicted = closed_form(config, model, Mesh(1, 1, 1), 0)
        assert predicted is not None
        return [trainable.memory()["activations"], predicted.memory["activations"]]

    measured, predicted = activations({})
    for term in TERMS:
        kept, planned = activations(term)
        assert kept - measured == planned - predicted > 0, term


@pytest.mark.parametrize("name", ["gpt", "llama", *NEWER])
@pytest.mark.parametrize("width, rows", [(64, 8), (256, 2), (256, 16)])  # activations, casts, joined casts
def test_predicted_bf16_activations_are_what_torch_keeps(name: str, width: int, rows: int) -> None:
    config = configured((1, 1, 1), name, micro_batch_size=None, batch_size=rows, precision="bf16")
    config.model = ModelConfig(name=name, layers=3, width=width, heads=4, **NEWER.get(name, {}))
    model, mesh = PRESETS[name](config.model, 97, 16), Mesh(1, 1, 1)
    trainable = single_rank_trainable(model, config)
    trainable.train_step([token_batch(shape=(rows, 16), vocab=97)], 1e-3, 0)
    predicted = closed_form(config, model, mesh, 0)
    assert predicted is not None
    assert predicted.memory["activations"] == pytest.approx(trainable.memory()["activations"], rel=0.01)


def test_a_dry_run_plans_64_gpus_and_touches_nothing(tmp_path: Path) -> None:
    plan = str(ROOT / "examples" / "plan_7b.yaml")
    done = run_python(["-m", "hvdlm", "--config", plan, "--dry_run", "--log.run", str(tmp_path / "run")])
    assert done.returncode == 0, done.stderr
    assert "6,738,415,616 parameters" in done.stdout and "64: 16 x 2 x 2" in done.stdout
    assert f"idle share {100 * 1 / 33:.1f}%" in done.stdout
    # Half of the elements of layers and embedding over two tensor ranks, and the sixteenth that ZeRO keeps of them.
    half = (6_738_415_616 - 65 * 4096) / 4 + 32 * 4096
    assert f"{4 * half * 17 / 16 / 2**30:.2f} GiB" in done.stdout
    assert list(tmp_path.iterdir()) == []


VIRTUAL = ["--parallel.pipeline", "2", "--parallel.virtual_stages", "2", "--train.micro_batch_size", "4"]
BAD = [
    (["--parallel.tensor", "3"], "model.heads 4 can't be split over parallel.tensor 3 ranks"),
    (["--parallel.pipeline", "5"], "parallel.pipeline 5 is more than model.layers 4"),
    (["--parallel.sequence", "true"], "parallel.sequence shards positions over tensor ranks"),
    (["--parallel.tensor", "2", "--parallel.sequence", "true", "--data.context", "63"], "data.context 63"),
    (["--parallel.tensor", "2", "--model.name", "lstm", "--model.width", "33"], "model.width 33"),
    (["--parallel.tensor", "2", "--model.name", "lstm", "--parallel.sequence", "true"], "is for Transformers"),
    (["--parallel.tensor", "4", "--model.heads", "12", "--model.width", "48", "--model.kv_heads", "6"], "kv_heads 6"),
    (["--parallel.tensor", "2", "--framework", "tensorflow", "--train.compile", "true"], "XLA can't compile"),
    (["--parallel.tensor", "2", "--model.name", "lstm", "--train.compile", "true"], "after every position"),
    (["--parallel.tensor", "2", "--train.activation_checkpointing", "true", "--train.compile", "true"], "recompute"),
    (["--parallel.data", "2", "--parallel.zero", "1", "--communication.exchange", "diloco"], "and diloco has none"),
    (
        ["--parallel.data", "2", "--parallel.zero", "1", "--communication.exchange", "streaming_diloco"],
        "and streaming_diloco has none",
    ),
    (
        ["--parallel.data", "2", "--parallel.pipeline", "2", "--communication.exchange", "streaming_diloco"],
        "would synchronise the two stages' copies of the tied embedding",
    ),
    (
        ["--parallel.data", "2", "--parallel.zero", "2", "--communication.compression.algorithm", "power_sgd"],
        "power_sgd sums or corrects whole gradients",
    ),
    (["--parallel.data", "2", "--parallel.zero_gather", "int8"], "without ZeRO they gather none"),
    ([*VIRTUAL, "--parallel.pipeline", "1"], "set --parallel.pipeline 2 or more"),
    ([*VIRTUAL, "--parallel.schedule", "gpipe"], "is of the schedule 1f1b, not of gpipe"),
    ([*VIRTUAL, "--model.name", "lstm"], "is for Transformers, not for a model of kind rnn"),
    ([*VIRTUAL, "--model.layers", "3"], "is more than model.layers 3: a virtual stage needs at least one layer"),
    ([*VIRTUAL, "--parallel.data", "2", "--parallel.zero", "2"], "set --parallel.zero 1, or leave it out"),
    ([*VIRTUAL, "--train.micro_batch_size", "32"], "needs a multiple of parallel.pipeline 2 micro-batches in a step"),
    (["--parallel.context", "2", "--data.document_masks", "true"], "set --data.document_masks false"),
]


@pytest.mark.parametrize("options, expected", BAD, ids=[" ".join(options) for options, _ in BAD])
def test_impossible_layouts_are_refused_in_one_sentence(
    options: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from hvdlm.cli import main

    assert main(["--dry_run", *options]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


def test_a_dry_run_shows_virtual_stages(capsys: pytest.CaptureFixture[str]) -> None:
    from hvdlm.cli import main

    assert main(["--dry_run", *VIRTUAL, "--model.layers", "8"]) == 0
    shown = capsys.readouterr().out
    assert "virtual stages 2" in shown and "stage 1 (4 layers)" in shown
    assert "8 micro-batch(es)" in shown and "idle share 5.9%" in shown  # 1 / (2 * 8 + 1)


def test_a_mesh_of_too_many_ranks_names_those_that_fit() -> None:
    from hvdlm.errors import HvdlmError

    with pytest.raises(HvdlmError, match="possible: 1x1x4, 1x2x2, 1x4x1, 2x1x2, 2x2x1"):
        make_mesh(4, ParallelConfig(3, 2, 1))
