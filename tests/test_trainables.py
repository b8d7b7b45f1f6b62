"""The contract of Trainable on one rank, in both frameworks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders import (
    CONTEXT,
    FRAMEWORKS,
    NEWER,
    ROWS,
    both_frameworks,
    case,
    parameters,
    small_trainable,
    token_batch,
    train_steps,
)
from hvdlm.config import TrainConfig
from hvdlm.parallel.parameter_groups import UpdateRates
from hvdlm_inference.generation import generate
from hvdlm_inference.sampling import Sampling, choose
from launching import run_python

MODELS = ["gpt", "llama", "rnn", "gru", "lstm"]
COVERED = pytest.mark.full(covered_by="gpt and lstm in TensorFlow, and this model in PyTorch")


def models_of(frameworks: list[str] = FRAMEWORKS) -> list[Any]:
    """Return pairs of framework and model; TensorFlow traces each for seconds."""
    few = {"tensorflow": ["gpt", "lstm"]}
    return [
        pytest.param(framework, model, marks=[] if model in few.get(framework, MODELS) else [COVERED])
        for framework in frameworks
        for model in MODELS
    ]


SHALLOW = {"layers": 1}  # where a second layer would add nothing but time, in which TensorFlow traces it


def assert_close(a: dict[str, np.ndarray], b: dict[str, np.ndarray], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("framework, model", models_of())
def test_micro_batches_give_the_same_update_as_one_batch(framework: str, model: str) -> None:
    # Without biases: a key's bias has no effect, and AdamW would turn its gradient of rounding errors into full steps.
    whole = small_trainable(framework, model, bias=False, **SHALLOW)
    cut = small_trainable(framework, model, micro_batch_size=2, bias=False, **SHALLOW)
    for a, b in zip(train_steps(whole, 3, weights=True), train_steps(cut, 3, micro=2, weights=True), strict=True):
        assert a.tokens == b.tokens
        assert abs(a.loss - b.loss) < 1e-5 and abs(a.grad_norm - b.grad_norm) < 1e-4 * a.grad_norm
    assert_close(parameters(whole), parameters(cut), 2e-4)


# Gradients depend on the model, and the update on the optimizer.
UPDATES = [(model, "adamw") for model in MODELS] + [("gpt", "sgd"), ("lstm", "adagrad")]
UPDATES += [(model, "sgd") for model in NEWER]
OTHER_UPDATES = [(m, o) for m in MODELS for o in ("sgd", "adagrad") if (m, o) not in UPDATES]
ALIKE = pytest.mark.full(covered_by="this model with AdamW, and this optimizer with another model")


@pytest.mark.parametrize("model, optimizer", [*UPDATES, *(pytest.param(*one, marks=ALIKE) for one in OTHER_UPDATES)])
def test_both_frameworks_make_the_same_updates(model: str, optimizer: str) -> None:
    options = {"optimizer": optimizer, "momentum": 0.9 if optimizer == "sgd" else 0.0}
    options |= {} if optimizer == "adamw" else SHALLOW
    options |= NEWER.get(model, {})
    one, other = (small_trainable(framework, model, **options, bias=False) for framework in FRAMEWORKS)
    for a, b in zip(train_steps(one, 5), train_steps(other, 5), strict=True):
        assert abs(a.loss - b.loss) < 1e-5 and abs(a.grad_norm - b.grad_norm) < 1e-4 * max(1.0, a.grad_norm)
    assert one.state().keys() == other.state().keys()
    assert_close(parameters(one), parameters(other), 2e-4)


def reference(c: TrainConfig, gradients: list[np.ndarray], start: np.ndarray, decayed: bool, rate: float) -> np.ndarray:
    """Return a parameter after the papers' update equations in float64."""
    p, m, v = start.astype(np.float64), np.zeros(start.shape), np.zeros(start.shape)
    for t, gradient in enumerate(gradients, 1):
        g, decay = gradient.astype(np.float64), c.weight_decay if decayed else 0.0
        if c.optimizer == "adamw":  # Loshchilov and Hutter 2019, algorithm 2
            p = p - rate * decay * p
            m, v = c.beta1 * m + (1 - c.beta1) * g, c.beta2 * v + (1 - c.beta2) * g * g
            p = p - rate * (m / (1 - c.beta1**t)) / (np.sqrt(v / (1 - c.beta2**t)) + c.epsilon)
        elif c.optimizer == "sgd":  # Sutskever et al. 2013, eq. 3 and 4, in the form without the rate in m
            g = g + decay * p
            m = c.momentum_value * m + g
            p = p - rate * (g + c.momentum_value * m if c.nesterov else m)
        else:  # Duchi et al. 2011, section 1.1, diagonal
            g = g + decay * p
            v = v + g * g
            p = p - rate * g / (np.sqrt(v) + c.epsilon)
    return p


@both_frameworks
def test_the_norm_of_a_large_gradient_is_exact(framework: str) -> None:
    """The norm, which is clipped and compared with the limit of spikes, of 3 million numbers of which few are large."""
    trainable = small_trainable(framework, "lstm", optimizer="sgd", weight_decay=0.0, clip=0.0, width=440)
    before = parameters(trainable)
    result = trainable.train_step([token_batch()], 1.0, 0)
    after = parameters(trainable)
    moved = sum(float(np.square(before[name].astype(np.float64) - after[name]).sum()) for name in before)
    assert sum(array.size for array in before.values()) > 3_000_000
    assert result.grad_norm == pytest.approx(moved**0.5, rel=1e-6)


NESTEROV = pytest.mark.full(covered_by="the rule with Nesterov momentum, and the papers' equations")
RULES = [
    {"optimizer": "adamw", "weight_decay": 0.2, "epsilon": 1e-3},
    {"optimizer": "sgd", "weight_decay": 0.0},
    {"optimizer": "sgd", "weight_decay": 0.1, "momentum": 0.9},
    {"optimizer": "sgd", "weight_decay": 0.1, "momentum": 0.9, "nesterov": True},
    {"optimizer": "adagrad", "weight_decay": 0.1, "epsilon": 1e-3},
]


@both_frameworks
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(map(str, rule.values())))
@pytest.mark.parametrize("exempt", [4, 32], ids=["few-exempt", "many-exempt"])
def test_update_rules_follow_the_papers(framework: str, rule: dict[str, Any], exempt: int) -> None:
    config = TrainConfig(**rule)
    random = np.random.default_rng(0)
    start, decayed = random.normal(size=64).astype(np.float32), np.arange(64) < 64 - exempt
    rates = UpdateRates(np.where(decayed, config.weight_decay, 0).astype(np.float32))
    gradients = [random.normal(size=64).astype(np.float32) for _ in range(6)]
    if framework == "torch":
        import torch

        from hvdlm_torch.optimizers import FlatOptimizer

        parameter, gradient = torch.from_numpy(start.copy()), torch.zeros(64)
        optimizer: Any = FlatOptimizer(config, parameter, gradient, rates)
        for step, g in enumerate(gradients):
            gradient.copy_(torch.from_numpy(g))
            optimizer.update(0.05, step, torch.ones((), dtype=torch.float64), torch.tensor(True))
        updated = parameter.numpy()
    else:
        import tensorflow as tf

        from hvdlm_tensorflow.optimizers import FlatOptimizer as TensorFlowOptimizer

        variable = tf.Variable(start)
        optimizer = TensorFlowOptimizer(config, variable, rates)
        for step, g in enumerate(gradients):
            optimizer.update(tf.constant(g), tf.constant(0.05), tf.constant(step, tf.float64))
        updated = variable.numpy()
    for some, decays in ((decayed, True), (~decayed, False)):
        expected = reference(config, [g[some] for g in gradients], start[some], decays, 0.05)
        np.testing.assert_allclose(updated[some], expected, rtol=2e-5, atol=2e-6)


# SGD with Nesterov momentum has what SGD and momentum have.
SKIPPED = [r if r["optimizer"] != "sgd" or "nesterov" in r else pytest.param(r, marks=NESTEROV) for r in RULES]
SKIPPED += [{"optimizer": "muon", "groups": {"embed.*": {"learning_rate_scale": 0.5, "weight_decay": 0.3}}}]


@both_frameworks
@pytest.mark.parametrize("rule", SKIPPED, ids=lambda rule: "-".join(map(str, rule.values())))
def test_a_skipped_step_changes_nothing(framework: str, rule: dict[str, Any]) -> None:
    """Neither parameters nor the rule's state, whether the norm is above the limit or NaN."""
    trainable = small_trainable(framework, **rule, **SHALLOW)
    train_steps(trainable, 2)
    before = trainable.state()
    undisturbed = trainable.train_step([token_batch(3)], 0.01, 3).loss, trainable.state()
    trainable.load_state(before)
    bad = token_batch(2, weights=True)
    bad.weights[:] = np.nan  # type: ignore[index]
    for batch, limit in ((token_batch(2), 1e-9), (bad, math.inf)):
        result = trainable.train_step([batch], 0.5, 2, limit)
        assert result.skipped and not result.applied
        after = trainable.state()
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[name], after[name]) for name in before)
    assert trainable.train_step([token_batch(3)], 0.01, 3).loss == undisturbed[0]
    assert all(np.array_equal(undisturbed[1][name], array) for name, array in trainable.state().items())


@both_frameworks
def test_clipping_bounds_the_norm_and_reports_the_original(framework: str) -> None:
    trainable = small_trainable(framework, optimizer="sgd", weight_decay=0.0, clip=0.01, **SHALLOW)
    before = parameters(trainable)
    result = train_steps(trainable, 1, rate=1.0)[0]
    after = parameters(trainable)
    moved = np.sqrt(sum(((after[n] - before[n]).astype(np.float64) ** 2).sum() for n in after))
    assert result.grad_norm > 0.1 and moved == pytest.approx(0.01, rel=1e-3)


@both_frameworks
@pytest.mark.parametrize("model", MODELS)
def test_incremental_decoding_equals_the_full_forward_pass(framework: str, model: str) -> None:
    trainable = small_trainable(framework, model, kv_heads=2)
    tokens = token_batch().inputs[:2]
    scores, cache = trainable.logits(tokens[:, :5])
    for position in range(5, CONTEXT):
        scores, cache = trainable.logits(tokens[:, position : position + 1], cache)
        whole, _ = trainable.logits(tokens[:, : position + 1])
        np.testing.assert_allclose(scores, whole, rtol=1e-4, atol=1e-5)


@both_frameworks
@pytest.mark.parametrize("model", ["gpt", "lstm"])
def test_the_loss_follows_from_the_logits(framework: str, model: str) -> None:
    trainable, rows = small_trainable(framework, model, **SHALLOW), token_batch(weights=True)
    total = 0.0
    for position in range(CONTEXT):
        scores = trainable.logits(rows.inputs[:, : position + 1])[0].astype(np.float64)
        logs = scores - np.log(np.exp(scores).sum(1, keepdims=True))
        total -= (logs[np.arange(ROWS), rows.targets[:, position]] * rows.weights[:, position]).sum()  # type: ignore[index]
    loss, tokens = trainable.eval_step(rows)
    assert tokens == rows.tokens and loss == pytest.approx(total, rel=1e-5)


RECOMPUTED = {"activation_checkpointing": True}


@both_frameworks
@pytest.mark.parametrize("model", ["gpt", "lstm"])
def test_activation_checkpointing_changes_no_result(framework: str, model: str) -> None:
    options = {"dropout": 0.1} | (SHALLOW if model == "lstm" else {})
    plain, sparing = (small_trainable(framework, model, **options, **more) for more in ({}, RECOMPUTED))
    for a, b in zip(train_steps(plain, 3), train_steps(sparing, 3), strict=True):
        assert abs(a.loss - b.loss) < 1e-5 and abs(a.grad_norm - b.grad_norm) < 1e-4 * a.grad_norm


@pytest.mark.parametrize("framework, model", models_of())
def test_bf16_stays_near_fp32_and_keeps_its_weights_in_fp32(framework: str, model: str) -> None:
    exact, half = (small_trainable(framework, model, **SHALLOW, precision=precision) for precision in ("fp32", "bf16"))
    a, b = train_steps(exact, 4)[-1].loss, train_steps(half, 4)[-1].loss
    assert a != b and abs(a - b) < 0.05
    assert all(v.dtype == np.float32 for v in parameters(half).values())


IN_TORCH = "gpt in TensorFlow, and lstm in PyTorch; lstm with dropout in test_a_restored_state_continues_bit_for_bit"
FEW = [("torch", "gpt"), ("torch", "lstm"), ("tensorflow", "gpt"), case("tensorflow", "lstm", covered_by=IN_TORCH)]


@pytest.mark.parametrize("framework, model", FEW)
def test_dropout_is_seeded_and_off_in_evaluation(framework: str, model: str) -> None:
    options = SHALLOW | {"dropout": 0.5}
    first, same = (small_trainable(framework, model, **options) for _ in range(2))
    without, other = (small_trainable(framework, model, **options | more) for more in ({"dropout": 0.0}, {"seed": 1}))
    assert first.eval_step(token_batch()) == pytest.approx(without.eval_step(token_batch()), rel=1e-6)
    a, b = ([r.loss for r in train_steps(t, 3)] for t in (first, same))
    assert a == b and abs(a[0] - train_steps(without, 1)[0].loss) > 1e-4
    assert other.train_step([token_batch(7)], 0.01, 1).loss != other.train_step([token_batch(7)], 0.0, 2).loss


COMPILED = pytest.mark.full(covered_by="test_compilation.py in tests/parallel, which generates code of two ranks")


@pytest.mark.parametrize("framework", [pytest.param(f, marks=COMPILED) if f == "torch" else f for f in FRAMEWORKS])
def test_compilation_changes_no_result(framework: str) -> None:
    plain, compiled = (small_trainable(framework, **SHALLOW, **more) for more in ({}, {"compile": True}))
    for a, b in zip(train_steps(plain, 2), train_steps(compiled, 2), strict=True):
        assert abs(a.loss - b.loss) < 1e-5


RESTORED = [("lstm", "adamw"), ("gpt", "sgd"), ("gpt", "adagrad")]
RESTORED += [pytest.param(*one, marks=ALIKE) for one in (("gpt", "adamw"), ("lstm", "sgd"), ("lstm", "adagrad"))]


@both_frameworks
@pytest.mark.parametrize("model, optimizer", RESTORED)
def test_a_restored_state_continues_bit_for_bit(framework: str, model: str, optimizer: str) -> None:
    rule = {"optimizer": optimizer, "momentum": 0.9, "micro_batch_size": 4}
    rule |= SHALLOW | {"dropout": 0.1}
    first, second = (small_trainable(framework, model, **rule) for _ in range(2))
    train_steps(first, 3, micro=4)
    second.load_state(first.state())
    for step in range(3, 6):
        rows = token_batch(step)
        micro_batches = [rows.rows(0, 4), rows.rows(4, 8)]
        a, b = (trainable.train_step(micro_batches, 0.01, step) for trainable in (first, second))
        assert a.loss == b.loss and a.grad_norm == b.grad_norm


def test_sampling_follows_temperature_top_k_and_top_p() -> None:
    scores = np.log(np.array([[0.5, 0.25, 0.15, 0.1]], np.float32))

    def drawn(**options: Any) -> list[int]:
        uniform = np.random.default_rng(0).random((1, 4000))
        tokens: list[int] = choose(scores, uniform, Sampling(**options).rule(None))[0].tolist()
        return tokens

    assert set(drawn(temperature=0)) == {0}
    assert set(drawn(temperature=1, top_k=2)) == {0, 1}
    assert set(drawn(temperature=1, top_p=0.8)) == {0, 1, 2}
    shares = np.bincount(drawn(temperature=1.0), minlength=4) / 4000
    np.testing.assert_allclose(shares, [0.5, 0.25, 0.15, 0.1], atol=0.03)
    cold = np.bincount(drawn(temperature=0.5), minlength=4) / 4000
    np.testing.assert_allclose(cold, np.array([0.25, 0.0625, 0.0225, 0.01]) / 0.345, atol=0.03)


@pytest.mark.parametrize("model", ["llama", "mistral", "gru"])
def test_both_frameworks_generate_alike_beyond_the_context(model: str) -> None:
    written = []
    for framework in FRAMEWORKS:
        trainable = small_trainable(framework, model, initial_scale=0.5, **NEWER.get(model, {}))
        context = 10**9 if model == "gru" else CONTEXT
        tokens = generate(trainable, np.array([1, 2, 3], np.int32), 30, context, Sampling(temperature=1.0, seed=4))
        written.append(list(tokens))
    assert written[0] == written[1] and len(written[0]) == 30


LOADS_KERAS = """
import sys
from hvdlm import plugins
from hvdlm.config import CompressionConfig, Config

manager = plugins.load([{framework!r}, "compression"])
manager.hook.hvdlm_prepare(config=Config(framework={framework!r}))
plugins.make(manager, "framework", {framework!r})
plugins.provided(manager, "compressors")["top_k"](CompressionConfig(algorithm="top_k"), 0, 0, 1)
assert "keras" in sys.modules and not {{"sklearn", "matplotlib"}} & set(sys.modules)
import matplotlib, sklearn
"""


@both_frameworks
def test_keras_does_not_load_unused_packages(framework: str, tmp_path: Path) -> None:
    for name in ("sklearn", "matplotlib"):
        (tmp_path / f"{name}.py").touch()
    code = LOADS_KERAS.format(framework=framework)
    done = run_python(["-c", code], PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
