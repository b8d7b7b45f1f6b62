"""Cross-entropy of large vocabularies, in chunks of targets in TensorFlow: its values, its gradients, its memory."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from builders import (
    FRAMEWORKS,
    configured_spec,
    parameters,
    single_rank_trainable,
    small_config,
    step_tensor_sizes,
    token_batch,
)
from hvdlm.config import LoRAConfig, TrainConfig
from hvdlm_language.loss_terms import LossTerms

pytestmark = pytest.mark.skipif("tensorflow" not in FRAMEWORKS, reason="chunks of TensorFlow")
TARGETS, WIDTH, VOCAB = 50, 16, 300
CHUNK = 20 * VOCAB  # logits: three chunks, the last one shorter


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from hvdlm_tensorflow import losses

    monkeypatch.setattr(losses, "_CHUNK", CHUNK)


# Every pair of two choices stays.
NONE, BOTH = LossTerms(), LossTerms(0.1, 0.05)
PAIRS = [(NONE, "float32", False), (BOTH, "float32", True), (NONE, "bfloat16", True), (BOTH, "bfloat16", False)]
OTHERS = pytest.mark.full(covered_by="the cases that have two of its three choices in common")
CASES = [
    pytest.param(*case[:2], tolerance, case[2], marks=[] if case in PAIRS else OTHERS)
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 0.05))
    for case in product((NONE, BOTH), (dtype,), (False, True))
]


def plain(hidden: Any, head: Any, bias: Any, targets: Any, weights: Any, terms: LossTerms) -> list[np.ndarray]:
    """Return the losses and the gradients of their sum by the plain formulas, in float64."""
    logits = hidden.astype(np.float64) @ head.T.astype(np.float64) + bias
    log_sum = np.log(np.exp(logits).sum(1, keepdims=True))
    logs = logits - log_sum
    wanted = np.full_like(logs, terms.smoothing / VOCAB)
    wanted[np.arange(TARGETS), targets] += 1 - terms.smoothing
    of_logits = (np.exp(logs) * (1 + 2 * terms.z_loss * log_sum) - wanted) * weights[:, None]
    losses = terms.z_loss * log_sum[:, 0] ** 2 - (wanted * logs).sum(1)
    return [losses * weights, of_logits @ head, of_logits.T @ hidden, of_logits.sum(0)]


@pytest.mark.parametrize(("terms", "dtype", "tolerance", "compiled"), CASES)
def test_chunks_have_the_plain_losses_and_gradients(
    terms: LossTerms, dtype: str, tolerance: float, compiled: bool, small_chunks: None
) -> None:
    import tensorflow as tf

    from hvdlm_tensorflow.losses import chunked_cross_entropy, rows_of_chunk

    assert rows_of_chunk(TARGETS, VOCAB) == 20
    random = np.random.default_rng(0)
    inputs = [tf.cast(random.standard_normal(shape), dtype) for shape in ((TARGETS, WIDTH), (VOCAB, WIDTH), (VOCAB,))]
    targets, weights = random.integers(0, VOCAB, TARGETS).astype(np.int32), random.random(TARGETS).astype(np.float32)

    def losses(hidden: Any, head: Any, bias: Any) -> Any:
        return chunked_cross_entropy(
            hidden, head, bias, tf.constant(targets), tf.constant(weights), terms, (True, True)
        )

    with tf.GradientTape() as tape:
        tape.watch(inputs)
        computed = tf.function(losses, autograph=False, jit_compile=compiled)(*inputs)
        total = 0.5 * tf.reduce_sum(computed)
    gradients = [2.0 * tf.cast(gradient, tf.float32) for gradient in tape.gradient(total, inputs)]
    hidden, head, bias = (t.numpy().astype(np.float32) for t in inputs)
    for a, b in zip([computed, *gradients], plain(hidden, head, bias, targets, weights, terms), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_gradients_of_single_losses_are_nan(small_chunks: None) -> None:
    """They are those of the sum, and nothing that is not."""
    import tensorflow as tf

    from hvdlm_tensorflow.losses import chunked_cross_entropy

    hidden, head, targets = tf.ones([TARGETS, WIDTH]), tf.ones([VOCAB, WIDTH]), tf.range(TARGETS)
    with tf.GradientTape() as tape:
        tape.watch(hidden)
        loss = chunked_cross_entropy(hidden, head, None, targets, None, LossTerms(), (True, False))[0]
    assert np.isnan(tape.gradient(loss, hidden).numpy()).all()


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("gpt", {}),
        ("gpt", {"precision": "bf16", "label_smoothing": 0.1}),
        ("gpt", {"label_smoothing": 0.1, "z_loss": 0.01}),
        ("llama", {"micro_batch_size": 4}),
        ("gpt", {"lora": {"rank": 2}}),
        ("gpt", {"lora": {"rank": 2, "layers": ["head"]}, "tie_embeddings": False}),
        ("rnn", {"compile": True}),
    ],
    ids=str,
)
def test_chunks_change_no_step_and_hold_few_logits(model: str, options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hvdlm_tensorflow import losses

    def trained(chunk: int) -> tuple[Any, Any, tuple[float, float]]:
        monkeypatch.setattr(losses, "_CHUNK", chunk)
        config = small_config("tensorflow", model, layers=1, tie_embeddings=options.get("tie_embeddings"))
        config.lora = LoRAConfig(**options.get("lora", {}))
        train = {name: value for name, value in options.items() if hasattr(config.train, name)}
        config.train = TrainConfig(**{"batch_size": 8, "warmup": 0, "optimizer": "sgd"} | train)
        trainable = single_rank_trainable(configured_spec(config, VOCAB), config)
        batch, micro = token_batch(vocab=VOCAB, weights=True), config.train.micro_batch_size or 8
        evaluated = trainable.eval_step(batch)
        micro_batches = [batch.rows(start, start + micro) for start in range(0, 8, micro)]
        return trainable, trainable.train_step(micro_batches, 0.1, 0), evaluated

    (one, a, evaluated), (other, b, expected) = trained(CHUNK), trained(2**25)
    tolerance = 1e-2 if "precision" in options else 1e-5
    assert a.loss == pytest.approx(b.loss, rel=tolerance) and a.grad_norm == pytest.approx(b.grad_norm, rel=tolerance)
    assert evaluated == pytest.approx(expected, rel=tolerance)
    for name, values in parameters(other).items():
        np.testing.assert_allclose(parameters(one)[name], values, rtol=tolerance, atol=tolerance, err_msg=name)
    if "compile" not in options:  # a compiled function's graph is listed with its caller
        logits = options.get("micro_batch_size", 8) * 12 * VOCAB
        assert logits in step_tensor_sizes(other) and logits not in step_tensor_sizes(one)
        assert CHUNK in step_tensor_sizes(one)


def test_small_vocabularies_are_not_cut() -> None:
    from hvdlm_tensorflow.losses import rows_of_chunk

    assert rows_of_chunk(12 * 256, 65) >= 12 * 256
    assert rows_of_chunk(12 * 1024, 50_304) == 768
    assert rows_of_chunk(1024, 50_304) == 667
