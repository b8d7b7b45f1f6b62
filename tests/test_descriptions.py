"""Descriptions of models, layouts, learning-rate schedules and meshes, compared with closed forms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import model_spec
from hvdlm.config import Config, ParallelConfig, TrainConfig
from hvdlm.configuration import validation
from hvdlm.errors import HvdlmError
from hvdlm.models.spec import Init, ParamSpec
from hvdlm.parallel.flat_layout import make_layout
from hvdlm.parallel.mesh import AXES, make_mesh
from hvdlm.training.lr_schedule import make_schedule


def test_parameter_counts_are_those_that_were_published() -> None:
    sizes = {"layers": 12, "width": 768, "heads": 12}
    assert model_spec("gpt2", 50257, 1024, **sizes).parameters == 124_439_808  # GPT-2 small (Radford et al. 2019)
    llama = model_spec("llama", 32000, 2048, layers=32, width=4096, heads=32, mlp_width=11008)
    assert llama.parameters == 6_738_415_616  # Llama 7B (Touvron et al. 2023)
    # Of the models' pages on huggingface.co.
    grouped = {"layers": 32, "width": 4096, "heads": 32, "kv_heads": 8, "mlp_width": 14336}
    assert model_spec("mistral", 32000, 4096, **grouped).parameters == 7_241_732_096  # Mistral 7B
    small = {"layers": 24, "width": 896, "heads": 14, "kv_heads": 2, "mlp_width": 4864, "tie_embeddings": True}
    assert model_spec("qwen2", 151936, 4096, **small).parameters == 494_032_768  # Qwen2 0.5B
    small = {"layers": 28, "width": 1024, "heads": 16, "kv_heads": 8, "head_width": 128, "mlp_width": 3072}
    assert model_spec("qwen3", 151936, 4096, **small, tie_embeddings=True).parameters == 596_049_920  # Qwen3 0.6B
    assert model_spec("neox", 50304, 2048, **sizes).parameters == 162_322_944  # Pythia 160M
    small = {"layers": 18, "width": 2048, "heads": 8, "kv_heads": 1, "head_width": 256, "mlp_width": 16384}
    assert model_spec("gemma", 256000, 8192, **small).parameters == 2_506_172_416  # Gemma 2B
    # torch.nn.LSTM(200, 200, 2) has 2 x 4 x 200 x (200 + 200 + 2) parameters.
    lstm = model_spec("lstm", 10_000, layers=2, width=200)
    assert lstm.parameters == 10_000 * 200 + 2 * 4 * 200 * 402 + 10_000 * 200 + 10_000


def test_flops_per_token_in_closed_form() -> None:
    gpt = model_spec("gpt", 65, 64, bias=False)
    weights = 4 * 12 * 128 * 128 + 65 * 128
    assert gpt.flops_per_token == 6 * weights + 12 * 4 * 128 * 64
    # Of the 64 x 64 / 2 pairs that causality leaves, a window of 4 leaves 64 x 4 - 4 x 4 / 2.
    local = model_spec("gpt", 65, 64, bias=False, window=4, head_width=48)
    wide = 4 * (4 * 128 * 4 * 48 + 2 * 4 * 128 * 128) + 65 * 128
    assert local.flops_per_token == 6 * wide + 12 * 4 * 4 * 48 * (64 * 4 - 4 * 4 / 2) / (64 / 2)
    assert model_spec("gru", 100, width=32, layers=1).flops_per_token == 6 * (2 * 3 * 32 * 32 + 100 * 32)


@pytest.mark.parametrize("kind", ["normal", "uniform"])
@given(st.integers(0, 40), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_any_slice_has_the_values_of_the_whole_tensor(kind: str, first: int, count: int) -> None:
    param = ParamSpec("w", (60, 7), ("a", "b"), Init(kind, 0.5))  # type: ignore[arg-type]
    rows = slice(first, min(60, first + count))
    np.testing.assert_array_equal(param.initial(5, rows), param.initial(5)[rows])


def test_initial_values_have_their_distribution() -> None:
    normal = ParamSpec("w", (400, 500), ("a", "b"), Init("normal", 0.02)).initial(1).astype(np.float64)
    assert abs(normal.mean()) < 3e-4 and abs(normal.std() / 0.02 - 1) < 0.01
    assert abs((np.abs(normal) < 0.02).mean() - 0.6827) < 0.005
    uniform = ParamSpec("w", (400, 500), ("a", "b"), Init("uniform", 0.1)).initial(1)
    assert np.abs(uniform).max() <= 0.1 and abs(uniform.std() - 0.1 / math.sqrt(3)) < 1e-3
    other = ParamSpec("v", (400, 500), ("a", "b"), Init("normal", 0.02)).initial(1)
    assert abs(np.corrcoef(normal.ravel(), other.ravel())[0, 1]) < 0.01


def test_layout_puts_the_last_layer_first_and_cuts_full_buckets() -> None:
    gpt = model_spec("llama", width=32, heads=2, kv_heads=1)
    layout = make_layout(gpt.params, 20_000)
    assert [slot.name for slot in layout.slots] == [p.name for p in reversed(gpt.params)]
    ranges = [layout.bucket_range(i) for i in range(len(layout.buckets))]
    assert ranges[0][0] == 0 and ranges[-1][1] == layout.size == gpt.parameters
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
    assert all(4 * (stop - start) >= 20_000 for start, stop in ranges[:-1])
    values = gpt.initial(1)
    restored = layout.unflatten(layout.flatten(values))
    assert all(np.array_equal(values[name], restored[name]) for name in values)


def rates(**options: object) -> list[float]:
    config = TrainConfig(steps=100, learning_rate=1.0, min_learning_rate=0.1, **options)  # type: ignore[arg-type]
    return [make_schedule(config)(step) for step in range(100)]


def test_schedules_follow_their_formulas() -> None:
    cosine = rates(schedule="cosine", warmup=10)
    assert cosine[0] == pytest.approx(1 / 11) and cosine[10] == 1.0
    assert cosine[55] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert rates(schedule="linear", warmup=0)[50] == pytest.approx(0.55)
    assert rates(schedule="inverse_sqrt", warmup=9)[36] == pytest.approx(0.5)
    assert rates(schedule="step", warmup=0, decay_every=30)[65] == 0.25
    later = rates(schedule="step", warmup=0, decay_every=10, decay_start=40)
    assert [later[step] for step in (0, 39, 40, 49, 50)] == [1.0, 1.0, 0.5, 0.5, 0.25]  # as in Zaremba et al. 2014
    assert set(rates(schedule="constant", warmup=0)) == {1.0}
    assert rates(schedule="cosine", warmup=0.1) == cosine
    stable = rates(schedule="wsd", warmup=10, cooldown=0.4)
    assert stable[:10] == cosine[:10] and set(stable[10:61]) == {1.0}
    assert stable[70] == pytest.approx(0.1 + 0.9 * (1 - math.sqrt(0.25)))
    linear = rates(schedule="wsd", warmup=10, cooldown=40, cooldown_shape="linear")
    assert linear[:61] == stable[:61] and linear[70] == pytest.approx(0.1 + 0.9 * 0.75)
    assert rates(schedule="wsd", warmup=90, cooldown=40)[:91] == rates(schedule="constant", warmup=90)[:91]


@pytest.mark.parametrize("peak", [1e-3, 1e-5, 20.0])
@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_the_rate_falls_to_a_tenth_by_default(name: str, peak: float) -> None:
    config = Config(train=TrainConfig(steps=10**6, learning_rate=peak, schedule=name, cooldown_shape="linear"))
    validation.values(config)
    last = make_schedule(config.train)(config.train.steps)
    assert last == pytest.approx(0.1 * peak, rel=1e-12) and config.train.min_learning_rate is None
    assert make_schedule(TrainConfig())(1000) == 1e-4  # as ever


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "inverse_sqrt", "step", "wsd"])
def test_schedules_stay_in_bounds_and_fall_after_warmup(name: str) -> None:
    curve = rates(schedule=name, warmup=20, decay_factor=0.9)
    assert all(0 < rate <= 1.0 for rate in curve)
    assert curve[:20] == sorted(curve[:20]) and curve[20:] == sorted(curve[20:], reverse=True)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))
@settings(deadline=None)
def test_groups_along_an_axis_partition_the_world(data: int, pipeline: int, tensor: int) -> None:
    mesh = make_mesh(data * pipeline * tensor, ParallelConfig(data, pipeline, tensor))
    for axis in AXES:
        groups = {mesh.group(axis, rank) for rank in range(mesh.size)}
        assert sorted(rank for group in groups for rank in group) == list(range(mesh.size))
        assert all(group in mesh.groups() for group in groups if len(group) > 1)
    assert mesh.group("tensor", 0) == tuple(range(tensor))  # neighbours, on one node


def test_a_mesh_that_does_not_fit_names_those_that_do() -> None:
    with pytest.raises(HvdlmError, match="possible: 1x1x4, 1x2x2, 1x4x1, 2x1x2, 2x2x1, 4x1x1"):
        make_mesh(4, ParallelConfig(tensor=3))
