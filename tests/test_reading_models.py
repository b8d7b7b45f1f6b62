"""What models that read features promise, in both frameworks: one body of tests, parametrised by framework."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hvdlm_tasks.models.ctc import BANDS

from hvdlm import plugins
from hvdlm.communication.all_reduce import AllReduceExchange
from hvdlm.config import Config, ModelConfig, ParallelConfig, TrainConfig
from hvdlm.models.spec import builtin_models
from hvdlm.parallel.mesh import make_mesh
from hvdlm.protocols.types import Batch
from hvdlm_backends.local import AloneGroup, LocalWorld

VOCAB, ROWS = 11, 4
MODELS = ["seq2seq", "ctc", "convnet"]
both = pytest.mark.parametrize("framework", ["torch", "tensorflow"])


def build(framework: str, model: str, train: dict[str, Any] | None = None, dropout: float = 0.0, **sizes: Any) -> Any:
    """Return a small trainable."""
    config = Config(framework=framework, model=ModelConfig(model, 2, 16, 4, dropout=dropout, **sizes))
    config.train = TrainConfig(batch_size=ROWS, warmup=0, epsilon=1e-4, **(train or {}))
    spec = builtin_models()[model](config.model, VOCAB, 64)
    maker = plugins.make(plugins.load([framework]), "framework", framework)
    return maker.build(spec, make_mesh(1, ParallelConfig()), LocalWorld(), AllReduceExchange(AloneGroup()), config)


def batch(model: str, seed: int = 0, more: int = 0) -> Batch:
    """Return random rows of unequal length; ``more``: padding beyond the longest."""
    random = np.random.default_rng(seed)
    if model == "convnet":
        images = random.standard_normal((ROWS, 28, 28)).astype(np.float32)
        labels = random.integers(0, VOCAB, (ROWS, 1)).astype(np.int32)
        return Batch(np.zeros_like(labels), labels, None, True, {"images": images})
    counts = np.array([7, 3, 5, 1], np.int32)
    time = 8 + more
    targets = random.integers(1, VOCAB, (ROWS, 8)).astype(np.int32)
    if model == "ctc":  # of three rows in a vocabulary without doubles, and one that doesn't fit into its frames
        frames, lengths = (
            random.standard_normal((ROWS, 40, BANDS)).astype(np.float32),
            np.array([40, 21, 8, 3], np.int32),
        )
        frames *= (np.arange(40) < lengths[:, None])[..., None]
        features = {"frames": np.pad(frames, ((0, 0), (0, 8 * more), (0, 0))), "frame_count": lengths}
    else:
        source, lengths = random.integers(0, VOCAB, (ROWS, 8)).astype(np.int32), np.array([2, 8, 5, 1], np.int32)
        features = {"source": np.pad(source, ((0, 0), (0, more))), "source_length": lengths}
    weights = (np.arange(time) < counts[:, None]).astype(np.float32)
    targets = np.pad(targets, ((0, 0), (0, more)))
    inputs = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
    return Batch(inputs, targets, weights, True, features)


def parameters(trainable: Any) -> dict[str, np.ndarray]:
    return {k: v for k, v in trainable.state().items() if k.startswith("parameters/")}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("model", MODELS)
def test_both_frameworks_make_the_same_updates(model: str, smoothing: float) -> None:
    one, other = (build(name, model, {"label_smoothing": smoothing}) for name in ("torch", "tensorflow"))
    for step in range(4):
        a, b = (t.train_step([batch(model, step)], 0.01, step) for t in (one, other))
        assert a.loss == pytest.approx(b.loss, abs=2e-5) and a.grad_norm == pytest.approx(b.grad_norm, rel=2e-4)
    np.testing.assert_allclose(one.predict(batch(model)), other.predict(batch(model)), atol=5e-4)
    assert one.eval_step(batch(model)) == pytest.approx(other.eval_step(batch(model)), abs=1e-3)


@both
@pytest.mark.parametrize("model", MODELS)
def test_micro_batches_give_the_same_update_as_one_batch(framework: str, model: str) -> None:
    whole, cut = build(framework, model), build(framework, model, {"micro_batch_size": 2})
    for step in range(2):
        rows = batch(model, step)
        a = whole.train_step([rows], 0.01, step)
        b = cut.train_step([rows.rows(0, 2), rows.rows(2, 4)], 0.01, step)
        assert a.loss == pytest.approx(b.loss, abs=1e-5) and a.tokens == b.tokens
    for name, value in parameters(whole).items():
        np.testing.assert_allclose(value, parameters(cut)[name], atol=2e-4, err_msg=name)


@both
@pytest.mark.parametrize("model", ["seq2seq", "ctc"])
def test_padding_changes_nothing(framework: str, model: str) -> None:
    trainable, short, long = build(framework, model), batch(model), batch(model, more=5)
    assert trainable.eval_step(short) == pytest.approx(trainable.eval_step(long), abs=1e-4)
    ends = [40 // 2, 11, 4, 2] if model == "ctc" else [8] * ROWS
    for row, end in enumerate(ends):
        a, b = (trainable.predict(given)[row, :end] for given in (short, long))
        np.testing.assert_allclose(a, b, atol=1e-5)


@both
def test_what_is_written_token_by_token_has_the_scores_of_what_is_written_at_once(framework: str) -> None:
    trainable, rows = build(framework, "seq2seq"), batch("seq2seq")
    expected, cache = trainable.predict(rows), trainable.read(rows)
    for time in range(4):
        scores, cache = trainable.logits(rows.inputs[:, time : time + 1], cache)
        np.testing.assert_allclose(scores, expected[:, time], atol=1e-5)
    order = np.array([2, 0, 0, 3])
    scores, _ = trainable.logits(rows.inputs[order, 4:5], trainable.select(cache, order))
    np.testing.assert_allclose(scores, expected[order, 4], atol=1e-5)


@both
@pytest.mark.parametrize("model", MODELS)
def test_dropout_is_drawn_anew_in_every_step_and_never_in_evaluation(framework: str, model: str) -> None:
    trainable, rows = build(framework, model, dropout=0.5), batch(model)
    assert trainable.eval_step(rows) == trainable.eval_step(rows)
    losses = {trainable.train_step([rows], 1e-9, step).loss for step in (0, 1, 2)}
    assert len(losses) == 3
    again = build(framework, model, dropout=0.5).train_step([rows], 1e-9, 0).loss
    assert min(abs(again - loss) for loss in losses) < 1e-6


@both
@pytest.mark.parametrize("model", MODELS)
def test_it_learns_what_it_is_shown(framework: str, model: str) -> None:
    trainable, rows = build(framework, model), batch(model)
    losses = [trainable.train_step([rows], 0.01, step).loss for step in range(40)]
    assert losses[-1] < 0.5 * losses[0]


@both
@pytest.mark.parametrize("model", ["seq2seq", "ctc"])
def test_bf16_stays_near_fp32(framework: str, model: str) -> None:
    half, full = build(framework, model, {"precision": "bf16"}), build(framework, model)
    rows = batch(model)
    assert half.eval_step(rows)[0] == pytest.approx(full.eval_step(rows)[0], rel=0.02)
    assert half.train_step([rows], 0.01, 0).grad_norm == pytest.approx(
        full.train_step([rows], 0.01, 0).grad_norm, rel=0.05
    )


@both
def test_ctc_is_the_sum_over_all_alignments(framework: str) -> None:
    """Against every alignment, one by one: 4 frames, the targets 'a', 'ab', 'aa' and one that doesn't fit."""
    from itertools import product

    if framework == "torch":
        import torch as library

        from hvdlm_torch.losses import ctc
    else:
        import tensorflow as library

        from hvdlm_tensorflow.losses import ctc
    convert = library.from_numpy if framework == "torch" else library.constant
    random, texts = np.random.default_rng(0), [[1], [1, 2], [1, 1], [1, 1, 1]]
    scores = random.standard_normal((4, 4, 3)).astype(np.float32)
    targets, weights = np.zeros((4, 3), np.int64), np.zeros((4, 3), np.float32)
    for row, text in enumerate(texts):
        targets[row, : len(text)], weights[row, : len(text)] = text, 1
    targets = targets if framework == "torch" else targets.astype(np.int32)
    lengths = np.array([4, 4, 4, 4], np.int32)
    found = ctc(convert(scores), convert(lengths), convert(targets), convert(weights)).numpy()
    shares = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    for row, text in enumerate(texts[:3]):
        total = 0.0
        for path in product(range(3), repeat=4):
            merged = [token for i, token in enumerate(path) if token and (i == 0 or path[i - 1] != token)]
            total += np.prod(shares[row, range(4), path]) if merged == text else 0.0
        assert found[row] == pytest.approx(-np.log(total), abs=1e-5)
    assert found[3] == 0
