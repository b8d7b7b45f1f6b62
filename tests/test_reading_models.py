"""Models with an encoder (translation, speech, images) in both frameworks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from builders import (
    ENCODER_MODELS,
    ENCODER_ROWS,
    ENCODER_VOCAB,
    FRAMEWORKS,
    both_frameworks,
    configured_spec,
    encoder_batch,
    parameters,
    single_rank_trainable,
    small_config,
)
from hvdlm.config import TrainConfig


def both_with(*models: str) -> pytest.MarkDecorator:
    """Return the cases of both frameworks with each model; ctc of TensorFlow, with the lines of seq2seq, in full."""
    mark = pytest.mark.full(covered_by="seq2seq in TensorFlow, ctc in torch, and both frameworks' same updates of ctc")
    cases = [(framework, model) for framework in FRAMEWORKS for model in models]
    marks = {("tensorflow", "ctc"): [mark]}
    return pytest.mark.parametrize(
        "framework, model", [pytest.param(*case, marks=marks.get(case, [])) for case in cases]
    )


def encoder_trainable(framework: str, model: str, dropout: float = 0.0, layers: int = 1, **train: Any) -> Any:
    """Return a small trainable of one of ``ENCODER_MODELS``; ``train``: options of that section."""
    config = small_config(framework, model, initial_scale=None, dropout=dropout, layers=layers)
    config.train = TrainConfig(**{"batch_size": ENCODER_ROWS, "warmup": 0, "epsilon": 1e-4} | train)
    config.data.context = 64
    return single_rank_trainable(configured_spec(config, ENCODER_VOCAB), config)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("model", ENCODER_MODELS)
def test_both_frameworks_make_the_same_updates(model: str, smoothing: float) -> None:
    terms = {"label_smoothing": smoothing} | ({"z_loss": smoothing / 10} if model != "ctc" else {})
    options = terms | {"layers": 1 if smoothing else 2}
    first, second = (encoder_trainable(name, model, **options) for name in ("torch", "tensorflow"))
    for step in range(4):
        a, b = (t.train_step([encoder_batch(model, step)], 0.01, step) for t in (first, second))
        assert a.loss == pytest.approx(b.loss, abs=2e-5) and a.grad_norm == pytest.approx(b.grad_norm, rel=2e-4)
    np.testing.assert_allclose(first.predict(encoder_batch(model)), second.predict(encoder_batch(model)), atol=5e-4)
    assert first.eval_step(encoder_batch(model)) == pytest.approx(second.eval_step(encoder_batch(model)), abs=1e-3)


@both_with(*ENCODER_MODELS)
def test_micro_batches_give_the_same_update_as_one_batch(framework: str, model: str) -> None:
    whole, split = encoder_trainable(framework, model), encoder_trainable(framework, model, micro_batch_size=2)
    for step in range(2):
        rows = encoder_batch(model, step)
        a = whole.train_step([rows], 0.01, step)
        b = split.train_step([rows.rows(0, 2), rows.rows(2, 4)], 0.01, step)
        assert a.loss == pytest.approx(b.loss, abs=1e-5) and a.tokens == b.tokens
    for name, value in parameters(whole).items():
        np.testing.assert_allclose(value, parameters(split)[name], atol=2e-4, err_msg=name)


@both_frameworks
@pytest.mark.parametrize("model", ["seq2seq", "ctc"])
def test_padding_changes_neither_loss_nor_predictions(framework: str, model: str) -> None:
    trainable, short, long = encoder_trainable(framework, model), encoder_batch(model), encoder_batch(model, padding=5)
    assert trainable.eval_step(short) == pytest.approx(trainable.eval_step(long), abs=1e-4)
    ends = [40 // 2, 11, 4, 2] if model == "ctc" else [8] * ENCODER_ROWS
    for row, end in enumerate(ends):
        a, b = (trainable.predict(rows)[row, :end] for rows in (short, long))
        np.testing.assert_allclose(a, b, atol=1e-5)


@both_frameworks
def test_incremental_decoding_equals_the_full_forward_pass(framework: str) -> None:
    trainable, rows = encoder_trainable(framework, "seq2seq", layers=2), encoder_batch("seq2seq")
    expected, cache = trainable.predict(rows), trainable.read(rows)
    for time in range(4):
        scores, cache = trainable.logits(rows.inputs[:, time : time + 1], cache)
        np.testing.assert_allclose(scores, expected[:, time], atol=1e-5)
    order = np.array([2, 0, 0, 3])
    scores, _ = trainable.logits(rows.inputs[order, 4:5], trainable.select(cache, order))
    np.testing.assert_allclose(scores, expected[order, 4], atol=1e-5)


@both_with(*ENCODER_MODELS)
def test_dropout_changes_every_step_and_is_off_in_evaluation(framework: str, model: str) -> None:
    trainable, rows = encoder_trainable(framework, model, dropout=0.5), encoder_batch(model)
    assert trainable.eval_step(rows) == trainable.eval_step(rows)
    losses = {trainable.train_step([rows], 1e-9, step).loss for step in (0, 1, 2)}
    assert len(losses) == 3
    repeated = encoder_trainable(framework, model, dropout=0.5).train_step([rows], 1e-9, 0).loss
    assert min(abs(repeated - loss) for loss in losses) < 1e-6


@both_with(*ENCODER_MODELS)
def test_every_model_fits_one_batch(framework: str, model: str) -> None:
    trainable, rows = encoder_trainable(framework, model), encoder_batch(model)
    losses = [trainable.train_step([rows], 0.01, step).loss for step in range(40)]
    assert losses[-1] < 0.5 * losses[0]


@both_with("seq2seq", "ctc")
def test_bf16_stays_near_fp32(framework: str, model: str) -> None:
    half, full = encoder_trainable(framework, model, precision="bf16"), encoder_trainable(framework, model)
    rows = encoder_batch(model)
    assert half.eval_step(rows)[0] == pytest.approx(full.eval_step(rows)[0], rel=0.02)
    assert half.train_step([rows], 0.01, 0).grad_norm == pytest.approx(
        full.train_step([rows], 0.01, 0).grad_norm, rel=0.05
    )


@both_frameworks
def test_ctc_is_the_sum_over_all_alignments(framework: str) -> None:
    """Compared with the sum over all alignments of 4 frames, for the targets a, ab, aa and one that doesn't fit."""
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
    losses = ctc(convert(scores), convert(lengths), convert(targets), convert(weights)).numpy()
    shares = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    for row, text in enumerate(texts[:3]):
        total = 0.0
        for path in product(range(3), repeat=4):
            merged = [token for i, token in enumerate(path) if token and (i == 0 or path[i - 1] != token)]
            total += np.prod(shares[row, range(4), path]) if merged == text else 0.0
        assert losses[row] == pytest.approx(-np.log(total), abs=1e-5)
    assert losses[3] == 0
