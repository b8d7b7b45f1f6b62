"""What a model on one rank promises, in both frameworks: one body of tests, parametrised by framework."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvdlm import plugins
from hvdlm.communication.all_reduce import AllReduceExchange
from hvdlm.config import Config, ModelConfig, ParallelConfig, TrainConfig
from hvdlm.inference.generation import generate
from hvdlm.inference.sampling import Sampling, choose
from hvdlm.models.spec import builtin_models
from hvdlm.parallel.mesh import make_mesh
from hvdlm.protocols.types import Batch
from hvdlm_backends.local import AloneGroup, LocalWorld
from launching import launch

VOCAB, CONTEXT, ROWS = 50, 12, 8
MODELS = ["gpt", "llama", "rnn", "gru", "lstm"]
both = pytest.mark.parametrize("framework", ["torch", "tensorflow"])


def build(framework: str, model: str = "gpt", train: dict[str, Any] | None = None, **sizes: Any) -> Any:
    """Return a small trainable."""
    sizes = {"layers": 2, "width": 16, "heads": 4, "initial_scale": 0.2, **sizes}
    config = Config(framework=framework, model=ModelConfig(name=model, **sizes))
    config.train = TrainConfig(batch_size=ROWS, warmup=0, **(train or {}))
    config.data.context = CONTEXT
    spec = builtin_models()[model](config.model, VOCAB, CONTEXT)
    maker = plugins.make(plugins.load([framework]), "framework", framework)
    return maker.build(spec, make_mesh(1, ParallelConfig()), LocalWorld(), AllReduceExchange(AloneGroup()), config)


def batch(step: int = 0, weights: bool = False) -> Batch:
    """Return random rows, perhaps with targets that don't count."""
    random = np.random.default_rng(step)
    tokens = random.integers(0, VOCAB, (ROWS, CONTEXT + 1)).astype(np.int32)
    mask = (random.random((ROWS, CONTEXT)) < 0.7).astype(np.float32) if weights else None
    return Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), mask, step == 0)


def train(trainable: Any, steps: int, micro: int = ROWS, weights: bool = False, rate: float = 0.01) -> list[Any]:
    """Return the results of ``steps`` steps."""
    found = []
    for step in range(steps):
        whole = batch(step, weights)
        parts = [whole.rows(start, start + micro) for start in range(0, ROWS, micro)]
        found.append(trainable.train_step(parts, rate, step))
    return found


def parameters(trainable: Any) -> dict[str, np.ndarray]:
    return {k: v for k, v in trainable.state().items() if k.startswith("parameters/")}


def assert_close(a: dict[str, np.ndarray], b: dict[str, np.ndarray], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=tolerance, atol=tolerance, err_msg=name)


@both
@pytest.mark.parametrize("model", MODELS)
def test_micro_batches_with_padding_give_the_same_update_as_one_batch(framework: str, model: str) -> None:
    # Without biases: a key's bias has no effect, and rules that divide by its gradient's size follow the rounding.
    whole = build(framework, model, bias=False)
    cut = build(framework, model, {"micro_batch_size": 2}, bias=False)
    for a, b in zip(train(whole, 3, weights=True), train(cut, 3, micro=2, weights=True), strict=True):
        assert a.tokens == b.tokens
        assert abs(a.loss - b.loss) < 1e-5 and abs(a.grad_norm - b.grad_norm) < 1e-4 * a.grad_norm
    assert_close(parameters(whole), parameters(cut), 2e-4)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adagrad"])
def test_both_frameworks_make_the_same_updates(model: str, optimizer: str) -> None:
    options = {"optimizer": optimizer, "momentum": 0.9 if optimizer == "sgd" else 0.0}
    one, other = (build(framework, model, options, bias=False) for framework in ("torch", "tensorflow"))
    for a, b in zip(train(one, 5), train(other, 5), strict=True):
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
            m = c.momentum * m + g
            p = p - rate * (g + c.momentum * m if c.nesterov else m)
        else:  # Duchi et al. 2011, section 1.1, diagonal
            g = g + decay * p
            v = v + g * g
            p = p - rate * g / (np.sqrt(v) + c.epsilon)
    return p


@both
def test_the_norm_of_a_large_gradient_is_exact(framework: str) -> None:
    """What is clipped, and compared with a spike's limit: here of 3 M numbers, of which few are large."""
    trainable = build(framework, "lstm", {"optimizer": "sgd", "weight_decay": 0.0, "clip": 0.0}, width=440)
    before = parameters(trainable)
    result = trainable.train_step([batch()], 1.0, 0)
    after = parameters(trainable)
    moved = sum(float(np.square(before[name].astype(np.float64) - after[name]).sum()) for name in before)
    assert sum(array.size for array in before.values()) > 3_000_000
    assert result.grad_norm == pytest.approx(moved**0.5, rel=1e-6)


RULES = [
    {"optimizer": "adamw", "weight_decay": 0.2, "epsilon": 1e-3},
    {"optimizer": "sgd", "weight_decay": 0.0},
    {"optimizer": "sgd", "weight_decay": 0.1, "momentum": 0.9},
    {"optimizer": "sgd", "weight_decay": 0.1, "momentum": 0.9, "nesterov": True},
    {"optimizer": "adagrad", "weight_decay": 0.1, "epsilon": 1e-3},
]


@both
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(map(str, rule.values())))
def test_update_rules_follow_the_papers(framework: str, rule: dict[str, Any]) -> None:
    config = TrainConfig(**rule)
    random = np.random.default_rng(0)
    start, mask = random.normal(size=64).astype(np.float32), np.repeat(np.float32([1, 0]), 32)
    gradients = [random.normal(size=64).astype(np.float32) for _ in range(6)]
    if framework == "torch":
        import torch

        from hvdlm_torch.optimizers import FlatOptimizer

        parameter, gradient = torch.from_numpy(start.copy()), torch.zeros(64)
        optimizer: Any = FlatOptimizer(config, parameter, gradient, torch.from_numpy(mask))
        for step, g in enumerate(gradients):
            gradient.copy_(torch.from_numpy(g))
            optimizer.update(0.05, step)
        found = parameter.numpy()
    else:
        import tensorflow as tf

        from hvdlm_tensorflow.optimizers import FlatOptimizer as TensorFlowOptimizer

        variable = tf.Variable(start)
        optimizer = TensorFlowOptimizer(config, variable, tf.constant(mask))
        for step, g in enumerate(gradients):
            optimizer.update(tf.constant(g), tf.constant(0.05), tf.constant(step, tf.float64))
        found = variable.numpy()
    for half, decayed in ((slice(0, 32), True), (slice(32, 64), False)):
        expected = reference(config, [g[half] for g in gradients], start[half], decayed, 0.05)
        np.testing.assert_allclose(found[half], expected, rtol=2e-5, atol=2e-6)


@both
def test_clipping_bounds_the_global_norm_and_reports_it_before(framework: str) -> None:
    rule = {"optimizer": "sgd", "weight_decay": 0.0, "clip": 0.01}
    trainable = build(framework, train=rule)
    before = parameters(trainable)
    result = train(trainable, 1, rate=1.0)[0]
    after = parameters(trainable)
    moved = np.sqrt(sum(((after[n] - before[n]).astype(np.float64) ** 2).sum() for n in after))
    assert result.grad_norm > 0.1 and moved == pytest.approx(0.01, rel=1e-3)


@both
@pytest.mark.parametrize("model", MODELS)
def test_the_cache_gives_what_the_whole_text_gives(framework: str, model: str) -> None:
    trainable = build(framework, model, kv_heads=2)
    tokens = batch().inputs[:2]
    scores, cache = trainable.logits(tokens[:, :5])
    for place in range(5, CONTEXT):
        scores, cache = trainable.logits(tokens[:, place : place + 1], cache)
        whole, _ = trainable.logits(tokens[:, : place + 1])
        np.testing.assert_allclose(scores, whole, rtol=1e-4, atol=1e-5)


@both
@pytest.mark.parametrize("model", ["gpt", "lstm"])
def test_a_loss_is_that_of_the_scores(framework: str, model: str) -> None:
    trainable, rows = build(framework, model), batch(weights=True)
    total = 0.0
    for place in range(CONTEXT):
        scores = trainable.logits(rows.inputs[:, : place + 1])[0].astype(np.float64)
        logs = scores - np.log(np.exp(scores).sum(1, keepdims=True))
        total -= (logs[np.arange(ROWS), rows.targets[:, place]] * rows.weights[:, place]).sum()  # type: ignore[index]
    found, tokens = trainable.eval_step(rows)
    assert tokens == rows.tokens and found == pytest.approx(total, rel=1e-5)


@both
@pytest.mark.parametrize("model", ["gpt", "lstm"])
def test_recomputing_activations_changes_nothing(framework: str, model: str) -> None:
    plain = build(framework, model, dropout=0.1)
    sparing = build(framework, model, {"activation_checkpointing": True}, dropout=0.1)
    for a, b in zip(train(plain, 3), train(sparing, 3), strict=True):
        assert abs(a.loss - b.loss) < 1e-5 and abs(a.grad_norm - b.grad_norm) < 1e-4 * a.grad_norm


@both
@pytest.mark.parametrize("model", MODELS)
def test_bf16_stays_near_fp32_and_keeps_its_weights_in_fp32(framework: str, model: str) -> None:
    exact, half = build(framework, model), build(framework, model, {"precision": "bf16"})
    a, b = train(exact, 4)[-1].loss, train(half, 4)[-1].loss
    assert a != b and abs(a - b) < 0.05
    assert all(v.dtype == np.float32 for v in parameters(half).values())


@both
@pytest.mark.parametrize("model", ["gpt", "lstm"])
def test_dropout_is_seeded_and_off_in_evaluation(framework: str, model: str) -> None:
    first, same = build(framework, model, dropout=0.5), build(framework, model, dropout=0.5)
    without, other = build(framework, model), build(framework, model, {"seed": 1}, dropout=0.5)
    assert first.eval_step(batch()) == pytest.approx(without.eval_step(batch()), rel=1e-6)
    a, b = ([r.loss for r in train(t, 3)] for t in (first, same))
    assert a == b and abs(a[0] - train(without, 1)[0].loss) > 1e-4
    assert other.train_step([batch(7)], 0.01, 1).loss != other.train_step([batch(7)], 0.0, 2).loss


@both
def test_the_compile_switch_changes_nothing_but_speed(framework: str) -> None:
    plain, compiled = build(framework), build(framework, train={"compile": True})
    for a, b in zip(train(plain, 2), train(compiled, 2), strict=True):
        assert abs(a.loss - b.loss) < 1e-5


@both
@pytest.mark.parametrize("model", ["gpt", "lstm"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adagrad"])
def test_a_state_taken_over_goes_on_bit_for_bit(framework: str, model: str, optimizer: str) -> None:
    rule = {"optimizer": optimizer, "momentum": 0.9, "micro_batch_size": 4}
    whole, first, second = (build(framework, model, rule, dropout=0.1) for _ in range(3))
    train(first, 3, micro=4)
    second.load_state(first.state())
    expected = train(whole, 6, micro=4)[3:]
    for step, result in enumerate(expected, 3):
        rows = batch(step)
        assert second.train_step([rows.rows(0, 4), rows.rows(4, 8)], 0.01, step).loss == result.loss


def test_sampling_draws_from_what_it_is_told_to() -> None:
    scores = np.log(np.array([0.5, 0.25, 0.15, 0.1]))

    def drawn(**options: Any) -> list[int]:
        random = np.random.default_rng(0)
        return [choose(scores, Sampling(**options), random) for _ in range(4000)]

    assert set(drawn(temperature=0)) == {0}
    assert set(drawn(temperature=1, top_k=2)) == {0, 1}
    assert set(drawn(temperature=1, top_p=0.8)) == {0, 1, 2}
    shares = np.bincount(drawn(temperature=1.0), minlength=4) / 4000
    np.testing.assert_allclose(shares, [0.5, 0.25, 0.15, 0.1], atol=0.03)
    cold = np.bincount(drawn(temperature=0.5), minlength=4) / 4000
    np.testing.assert_allclose(cold, np.array([0.25, 0.0625, 0.0225, 0.01]) / 0.345, atol=0.03)


@pytest.mark.parametrize("model", ["llama", "gru"])
def test_both_frameworks_write_the_same_text_beyond_the_context(model: str) -> None:
    written = []
    for framework in ("torch", "tensorflow"):
        trainable = build(framework, model, initial_scale=0.5)
        context = CONTEXT if model == "llama" else 10**9
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
plugins.compressors(manager)["top_k"](CompressionConfig(algorithm="top_k"), 0, 0, 1)
assert "keras" in sys.modules and not {{"sklearn", "matplotlib"}} & set(sys.modules)
import matplotlib, sklearn
"""


@both
def test_keras_loads_nothing_that_no_run_uses_and_a_run_still_can(framework: str, tmp_path: Path) -> None:
    for name in ("sklearn", "matplotlib"):
        (tmp_path / f"{name}.py").touch()
    code = LOADS_KERAS.format(framework=framework)
    done = launch("", 1, ["-c", code], PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
