"""The optimizer muon against the paper's algorithm in numpy, in both frameworks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from builders import (
    FRAMEWORKS,
    both_frameworks,
    configured_spec,
    model_spec,
    parameters,
    small_config,
    small_trainable,
    token_batch,
    train_steps,
)
from hvdlm.config import TrainConfig
from hvdlm.errors import HvdlmError
from hvdlm.parallel import muon, parameter_groups
from hvdlm.parallel.mesh import Mesh
from hvdlm.planning.closed_forms import closed_form
from hvdlm.planning.gradient_work import work_of
from hvdlm.planning.hardware import find_hardware, read_hardware
from hvdlm.planning.step_time import predict_time

RATE = 0.02
OPTIONS: dict[str, Any] = {"optimizer": "muon", "clip": 0.0, "weight_decay": 0.1, "mlp_width": 24}
GROUPS = {
    "layers.0.*.query": {"muon": False},
    "embed.positions": {"muon": True},
    "layers.*.mlp.up": {"learning_rate_scale": 0.5, "weight_decay": 0.3},
}


def newton_schulz(matrix: np.ndarray) -> np.ndarray:
    """Return Jordan et al.'s ``zeropower_via_newtonschulz5``, in float64."""
    x = matrix.astype(np.float64)
    x = x / (np.linalg.norm(x) + 1e-7)
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Reference:
    """Liu et al. 2025, section 2.2: Muon on matrices; Loshchilov and Hutter 2019, algorithm 2, on other parameters."""

    def __init__(self, options: TrainConfig, matrices: set[str], decays: dict[str, float], scales: dict[str, float]):
        self.options, self.matrices, self.decays, self.scales = options, matrices, decays, scales
        self.state: dict[str, list[np.ndarray]] = {}

    def step(self, p: dict[str, np.ndarray], gradients: dict[str, np.ndarray], t: int) -> dict[str, np.ndarray]:
        c, new = self.options, {}
        for name, g in gradients.items():
            rate = RATE * self.scales.get(name, 1.0)
            x = p[name].astype(np.float64) * (1 - rate * self.decays[name])
            m, v = self.state.get(name, [np.zeros(g.shape)] * 2)
            if name in self.matrices:
                m = 0.95 * m + g
                x = x - rate * 0.2 * np.sqrt(max(g.shape)) * newton_schulz(g + 0.95 * m)
            else:
                m, v = c.beta1 * m + (1 - c.beta1) * g, c.beta2 * v + (1 - c.beta2) * g * g
                x = x - rate * (m / (1 - c.beta1**t)) / (np.sqrt(v / (1 - c.beta2**t)) + c.epsilon)
            self.state[name], new[name] = [m, v], x
        return new


def gradients_of(meter: Any, at: dict[str, np.ndarray], step: int) -> dict[str, np.ndarray]:
    """Return the gradients at some parameters; ``meter``: a trainable with plain SGD."""
    meter.load_state({f"parameters/{name}": array for name, array in at.items()})
    meter.train_step([token_batch(step)], 1e4, step)
    return {name: (at[name].astype(np.float64) - after) / 1e4 for name, after in parameters(meter).items()}


@both_frameworks
@pytest.mark.parametrize("groups", [None, GROUPS], ids=["", "groups"])
def test_steps_follow_the_paper(framework: str, groups: dict[str, Any] | None) -> None:
    trainable = small_trainable(framework, groups=groups, epsilon=1e-3, **OPTIONS)
    meter = small_trainable(framework, optimizer="sgd", weight_decay=0.0, clip=0.0, mlp_width=24)
    spec = model_spec("gpt", layers=2, width=16, heads=4, mlp_width=24)
    matrices = {p.name for p in spec.params if p.name.startswith("layers.") and p.name.endswith(".weight")}
    decays = {p.name: 0.1 if len(p.shape) == 2 else 0.0 for p in spec.params}
    scales = {}
    if groups:
        matrices = matrices - {"layers.0.attention.query.weight"} | {"embed.positions"}
        scales = {f"layers.{i}.mlp.up.weight": 0.5 for i in range(2)}
        decays |= dict.fromkeys(scales, 0.3)
    options = TrainConfig(optimizer="muon", epsilon=1e-3)
    reference, expected = Reference(options, matrices, decays, scales), parameters(trainable)
    for step in range(3):
        at = parameters(trainable)
        expected = reference.step(at, gradients_of(meter, at, step), step + 1)
        trainable.train_step([token_batch(step)], RATE, step)
        for name, array in parameters(trainable).items():
            np.testing.assert_allclose(array, expected[name], rtol=0, atol=2e-5, err_msg=name)
    moments = {name.split("/", 2)[2] for name in trainable.state() if name.startswith("optimizer/second_moment/")}
    momenta = {name.split("/", 2)[2] for name in trainable.state() if name.startswith("optimizer/momentum/")}
    assert momenta == matrices and moments == set(expected) - matrices


@both_frameworks
@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 8, 24), (2, 24, 8)], ids=str)
def test_singular_values_come_near_one(framework: str, shape: tuple[int, ...]) -> None:
    matrices = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    if framework == "torch":
        import torch

        from hvdlm_torch.muon import orthogonalized

        result = orthogonalized(torch.from_numpy(matrices)).numpy()
    else:
        import tensorflow as tf

        from hvdlm_tensorflow.muon import orthogonalized as in_tensorflow

        result = in_tensorflow(tf.constant(matrices)).numpy()
    for matrix, orthogonal in zip(matrices, result, strict=True):
        np.testing.assert_allclose(orthogonal, newton_schulz(matrix), atol=2e-5)
        left, values, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
        near = left.T @ orthogonal @ right.T  # diagonal: the singular vectors stay
        assert np.abs(near - np.diag(np.diag(near))).max() < 1e-4
        assert np.all((np.diag(near)[values > values[0] / 50] > 0.5) & (np.diag(near) < 1.3)[values > values[0] / 50])


@pytest.mark.skipif(len(FRAMEWORKS) < 2, reason="two frameworks")
def test_both_frameworks_train_alike() -> None:
    one, other = (small_trainable(framework, bias=False, **{**OPTIONS, "clip": 1.0}) for framework in FRAMEWORKS)
    losses, others = ([r.loss for r in train_steps(trainable, 30)] for trainable in (one, other))
    assert losses == pytest.approx(others, abs=1e-4) and losses[-1] < losses[0] - 0.05
    assert one.state().keys() == other.state().keys()
    for name, array in parameters(one).items():
        np.testing.assert_allclose(array, parameters(other)[name], rtol=0, atol=1e-4, err_msg=name)


@both_frameworks
def test_training_resumes_bit_for_bit(framework: str) -> None:
    first, second = (small_trainable(framework, groups=GROUPS, **OPTIONS) for _ in range(2))
    train_steps(first, 3)
    second.load_state(first.state())
    batches = [token_batch(step) for step in (3, 4)]
    again = [[t.train_step([b], RATE, s).loss for s, b in enumerate(batches, 3)] for t in (first, second)]
    assert again[0] == again[1]
    for name, array in first.state().items():
        assert np.array_equal(array, second.state()[name]), name


def test_a_run_of_adamw_is_continued_with_its_moments() -> None:
    first, second = small_trainable("torch"), small_trainable("torch", **{**OPTIONS, "mlp_width": None})
    train_steps(first, 2)
    before = first.state()
    second.load_state(before)
    after = second.state()
    assert np.array_equal(after["optimizer/second_moment/embed.tokens"], before["optimizer/second_moment/embed.tokens"])
    assert "optimizer/second_moment/layers.0.mlp.up.weight" not in after
    assert not after["optimizer/momentum/layers.0.mlp.up.weight"].any()


def test_large_vectors_are_updated_in_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = small_trainable("torch", groups={"embed.*": {"learning_rate_scale": 0.5}}, bias=False, **OPTIONS)
    losses = [r.loss for r in train_steps(copied, 3)]
    monkeypatch.setattr(muon, "_LONG", 100)
    in_place = small_trainable("torch", groups={"embed.*": {"learning_rate_scale": 0.5}}, bias=False, **OPTIONS)
    layout = in_place._sharded.muon
    assert layout.long and layout.short and not copied._sharded.muon.long
    assert [r.loss for r in train_steps(in_place, 3)] == pytest.approx(losses, abs=1e-6)
    for name, array in copied.state().items():
        np.testing.assert_allclose(in_place.state()[name], array, rtol=1e-5, atol=1e-6, err_msg=name)


def test_momentum_is_that_of_the_optimizer_unless_it_is_given() -> None:
    assert TrainConfig(optimizer="muon").momentum_value == 0.95
    assert TrainConfig(optimizer="muon", momentum=0.0).momentum_value == 0.0
    assert TrainConfig(optimizer="sgd").momentum_value == 0.0


@pytest.mark.parametrize("name", ["gpt", "llama", "seq2seq"])
def test_embeddings_heads_and_vectors_are_not_orthogonalized(name: str) -> None:
    spec, options = model_spec(name, tie_embeddings=False), TrainConfig(optimizer="muon")
    others = {p.name for p in spec.params} - muon.names_of(spec, options)
    assert {"embed.tokens", "head.weight"} <= others and len(others) < len(spec.params)
    assert not any(name.endswith(".weight") for name in others - {"head.weight"})
    assert not muon.names_of(spec, TrainConfig())


def test_the_plan_has_its_state_its_products_and_their_seconds() -> None:
    config = small_config("torch", mlp_width=24)
    spec, times = configured_spec(config), {}
    for optimizer in ("adamw", "muon"):
        config.train = TrainConfig(batch_size=8, optimizer=optimizer)
        times[optimizer] = predict_time(config, spec, Mesh(1, 1, 1), read_hardware(find_hardware("cpu_ethernet")))
    step, costs = work_of(config, spec, Mesh(1, 1, 1), 0), closed_form(config, spec, Mesh(1, 1, 1), 0)
    assert step and costs and costs.memory
    # Per layer, 4 matrices of 16 x 16 and 2 of 16 x 24, in 5 iterations of 3 products.
    square, wide = 3 * 2 * 16**3, 2 * (2 * 16 * 16 * 24) + 2 * 16**3
    assert sum(product.flops for product in step.update_products) == 2 * 5 * (4 * square + 2 * wide)
    matrices = 2 * (4 * 16 * 16 + 2 * 16 * 24)
    assert costs.memory["optimizer"] == 4 * (matrices + 2 * (spec.parameters - matrices))
    assert times["muon"].compute > times["adamw"].compute


def test_bad_combinations_are_refused() -> None:
    options = TrainConfig(optimizer="muon")
    with pytest.raises(HvdlmError, match=r"hidden matrices \[inputs, outputs\], and this rnn has none"):
        muon.check(options, model_spec("lstm"))
    options.groups = {"layers.*": {"muon": True}}
    with pytest.raises(HvdlmError, match=r"orthogonalizes matrices, and layers\.\S+ is none"):
        parameter_groups.check(options, model_spec("gpt"))
    options.groups = {"*": {"muon": 1}}
    with pytest.raises(HvdlmError, match=r"muon is 1, with train\.optimizer muon; expected true or false"):
        parameter_groups.check(options, model_spec("gpt"))
