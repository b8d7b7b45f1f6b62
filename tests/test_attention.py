"""Attention of long contexts, in chunks of queries in TensorFlow: its values, its gradients, its memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from builders import (
    ENCODER_ROWS,
    ENCODER_VOCAB,
    FRAMEWORKS,
    both_frameworks,
    configured_spec,
    encoder_batch,
    parameters,
    single_rank_trainable,
    small_config,
    step_tensor_sizes,
    token_batch,
)
from hvdlm.config import TrainConfig
from hvdlm.parallel.mesh import Mesh
from hvdlm.planning.closed_forms import closed_form
from hvdlm.protocols.types import Batch

HEADS, ROWS, TIME = 4, 2, 256  # TIME: in several chunks
needs_tensorflow = pytest.mark.skipif("tensorflow" not in FRAMEWORKS, reason="chunks are TensorFlow's")


def long_trainable(framework: str, model: str = "gpt", time: int = TIME, **train: Any) -> Any:
    """Return a small trainable of one process with a long context."""
    config = small_config(framework, model, kv_heads=2, bias=False, layers=1, window=70 if model == "mistral" else None)
    config.data.context = time
    options: dict[str, Any] = {"batch_size": ROWS, "warmup": 0, "optimizer": "sgd"}
    config.train = TrainConfig(**options | train)
    return single_rank_trainable(configured_spec(config), config)


def step(trainable: Any, time: int = TIME) -> Any:
    return trainable.train_step([token_batch(shape=(ROWS, time))], 0.1, 0)


OTHER_HEADS = pytest.mark.full(covered_by="these heads at 193 in float32, and this length and dtype with 2 heads")
LENGTHS = [
    pytest.param(
        time, dtype, tolerance, heads, marks=[] if heads == 2 or (time, dtype) == (193, "float32") else OTHER_HEADS
    )
    for time, dtype, tolerance in ((100, "float32", 1e-5), (193, "float32", 1e-5), (193, "bfloat16", 0.04))
    for heads in (HEADS, 2, 1)
]


def plain_attention(
    q: Any, k: Any, v: Any, gradient: Any, window: int = TIME, starts: np.ndarray | None = None
) -> list[np.ndarray]:
    """Return causal attention ``[rows, time, heads * head]`` and its gradients by the plain formulas, in float64.

    ``starts``: the positions where documents begin, ``[rows, time]``.
    """
    group, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
    q, k, v, gradient = (t.astype(np.float64) for t in (q, np.repeat(k, group, 1), np.repeat(v, group, 1), gradient))
    seen = np.tri(q.shape[2], dtype=bool) & ~np.tri(q.shape[2], k=-window, dtype=bool)
    if starts is not None:
        seen = seen & (np.arange(q.shape[2]) >= starts[:, None, :, None])
    scores = np.where(seen, scale * q @ k.swapaxes(2, 3), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    rows, heads, time, head = q.shape
    output = (weights @ v).swapaxes(1, 2).reshape(rows, time, heads * head)
    of_heads = gradient.reshape(rows, time, heads, head).swapaxes(1, 2)
    of_weights = of_heads @ v.swapaxes(2, 3)
    of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdims=True)) * scale
    of_kv = [
        (a.swapaxes(2, 3) @ b).reshape(rows, -1, group, time, head) for a, b in ((of_scores, q), (weights, of_heads))
    ]
    return [output, of_scores @ k, *(gradient.sum(2) for gradient in of_kv)]


@needs_tensorflow
@pytest.mark.parametrize(("time", "dtype", "tolerance", "kv_heads"), LENGTHS)
def test_chunks_have_the_plain_formulas_gradients(kv_heads: int, time: int, dtype: str, tolerance: float) -> None:
    """Differentiated outside of the graph, as pipeline stages are, and compiled."""
    import tensorflow as tf

    from hvdlm_tensorflow.attention import attend_causally, chunk_count

    assert chunk_count(time) == {100: 1, 193: 3}[time]
    random = np.random.default_rng(0)
    shapes = [(ROWS, heads, time, 8) for heads in (HEADS, kv_heads, kv_heads)]
    tensors = [tf.cast(random.standard_normal(shape), dtype) for shape in (*shapes, (ROWS, time, HEADS * 8))]
    expected = plain_attention(*(t.numpy().astype(np.float32) for t in tensors))
    *qkv, gradient = tensors
    for compiled in (False, True):
        graph = tf.function(lambda q, k, v: attend_causally(q, k, v, time), autograph=False, jit_compile=compiled)
        with tf.GradientTape() as tape:
            tape.watch(qkv)
            output = graph(*qkv)
        computed = [output, *tape.gradient(output, qkv, output_gradients=gradient)]
        for a, b in zip(computed, expected, strict=True):
            assert a.dtype == dtype
            np.testing.assert_allclose(a.numpy().astype(np.float32), b, rtol=tolerance, atol=tolerance)


# Windows of one position, that don't divide the length, that are longer than chunks, and that hold all positions.
WINDOWS = [(16, 1), (16, 5), (193, 7), (193, 100), (193, 193), (12, 16)]


def some_starts(time: int) -> np.ndarray:
    """Return where documents begin in rows: everywhere, once, never, ..."""
    random = np.random.default_rng(1)
    begins = random.random((ROWS, time)) < np.linspace(0.0, 0.2, ROWS)[:, None]
    return np.maximum.accumulate(np.where(begins, np.arange(time), 0), 1).astype(np.int32)


@both_frameworks
@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize(("time", "window"), WINDOWS)
def test_windows_have_the_plain_formulas_gradients(framework: str, time: int, window: int, divided: bool) -> None:
    """With documents in the rows, too."""
    starts = some_starts(time) if divided else None
    random = np.random.default_rng(0)
    shapes = [(ROWS, HEADS, time, 8), (ROWS, 2, time, 8), (ROWS, 2, time, 8), (ROWS, time, HEADS * 8)]
    *qkv, gradient = (random.standard_normal(shape).astype(np.float32) for shape in shapes)
    expected = plain_attention(*qkv, gradient, window, starts)
    if framework == "torch":
        import torch

        from hvdlm_torch.attention import attend_causally, document_masks

        tensors = [torch.tensor(array, requires_grad=True) for array in qkv]
        masks = () if starts is None else document_masks(torch.from_numpy(starts), window, torch.float32)
        output = attend_causally(*tensors, window, masks)
        output.backward(torch.from_numpy(gradient))
        computed = [output.detach(), *(tensor.grad for tensor in tensors)]
    else:
        import tensorflow as tf

        from hvdlm_tensorflow.attention import attend_causally

        tensors = [tf.constant(array) for array in qkv]
        graph = tf.function(lambda q, k, v: attend_causally(q, k, v, time, window, starts), autograph=False)
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            output = graph(*tensors)
        computed = [output, *tape.gradient(output, tensors, output_gradients=tf.constant(gradient))]
    for a, b in zip(computed, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@needs_tensorflow
@pytest.mark.parametrize("alike", [False, True])
def test_masks_of_any_shape_are_cut_into_chunks(alike: bool) -> None:
    """Padding, which is alike for all queries, and one mask per query; more keys than queries."""
    import tensorflow as tf

    from hvdlm_tensorflow import attention

    random = np.random.default_rng(0)
    shapes = [(ROWS, HEADS, 193, 8), (ROWS, HEADS, 200, 8), (ROWS, HEADS, 200, 8), (ROWS, 193, HEADS * 8)]
    *qkv, gradient = (tf.constant(random.standard_normal(shape), tf.float32) for shape in shapes)
    mask = tf.where(random.random((ROWS, 1, 1 if alike else 193, 200)) < 0.5, 0.0, -np.inf)
    results = []
    for one_chunk in (False, True):
        with pytest.MonkeyPatch.context() as patch, tf.GradientTape() as tape:
            patch.setattr(attention, "_ONE_CHUNK", 193 if one_chunk else 128)
            tape.watch(qkv)
            output = tf.function(attention.attend, autograph=False)(*qkv, mask)
        results.append([output, *tape.gradient(output, qkv, output_gradients=gradient)])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


LLAMA = pytest.mark.full(covered_by="gpt with these options, and llama without: they call the same attention")
STEPS_WITHOUT_SCORES = [("gpt", {}), ("gpt", {"activation_checkpointing": True}), ("gpt", {"precision": "bf16"})]
STEPS_WITHOUT_SCORES += [
    ("llama", {}),
    pytest.param("llama", {"activation_checkpointing": True}, marks=LLAMA),
    pytest.param("llama", {"precision": "bf16"}, marks=LLAMA),
]


@needs_tensorflow
@pytest.mark.parametrize("model, options", STEPS_WITHOUT_SCORES, ids=str)
def test_no_tensor_of_a_step_has_all_scores(model: str, options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hvdlm_tensorflow import attention

    in_chunks, whole = long_trainable("tensorflow", model, **options), long_trainable("tensorflow", model, **options)
    first = step(in_chunks)
    scores = ROWS * HEADS * TIME * TIME
    assert max(step_tensor_sizes(in_chunks)) == scores // attention.chunk_count(TIME) <= scores // 4
    monkeypatch.setattr(attention, "_ONE_CHUNK", TIME)
    second = step(whole)
    assert max(step_tensor_sizes(whole)) == scores
    if "activation_checkpointing" not in options:
        assert whole.memory()["activations"] > 1.5 * in_chunks.memory()["activations"]
    tolerance = 2e-2 if options.get("precision") else 1e-5
    assert first.loss == pytest.approx(second.loss, rel=tolerance)
    assert first.grad_norm == pytest.approx(second.grad_norm, rel=tolerance)


@needs_tensorflow
def test_activations_grow_with_the_context_as_predicted() -> None:
    """All weights would be four times as large, all other activations twice as large."""
    ratios = []
    for time in (TIME, 2 * TIME):
        trainable = long_trainable("tensorflow", time=time)
        step(trainable, time)
        predicted = closed_form(trainable._config, trainable._spec, Mesh(1, 1, 1), 0)
        assert predicted is not None
        ratios.append(trainable.memory()["activations"] / predicted.memory["activations"])
    assert ratios[0] == pytest.approx(ratios[1], rel=0.02) and 1.0 < ratios[0] < 2.5


@needs_tensorflow
@pytest.mark.parametrize("model", ["seq2seq", "ctc"])
def test_encoders_attend_in_chunks(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from hvdlm_tensorflow import attention

    results = []
    for count in (1, 3):
        monkeypatch.setattr(attention, "chunk_count", lambda time, count=count: count)
        config = small_config("tensorflow", model, initial_scale=None, layers=1)
        config.train = TrainConfig(batch_size=ENCODER_ROWS, warmup=0, optimizer="sgd")
        config.data.context = 64
        trainable = single_rank_trainable(configured_spec(config, ENCODER_VOCAB), config)
        result = trainable.train_step([encoder_batch(model)], 0.1, 0)
        results.append([result.loss, result.grad_norm, trainable.eval_step(encoder_batch(model))[0]])
    assert results[0] == pytest.approx(results[1], rel=1e-4)


@pytest.mark.skipif(len(FRAMEWORKS) < 2, reason="compares two frameworks")
@pytest.mark.parametrize(("model", "compiled"), [("gpt", False), ("llama", True), ("mistral", False)])
def test_long_contexts_train_alike_in_both_frameworks(model: str, compiled: bool) -> None:
    one, other = long_trainable("torch", model), long_trainable("tensorflow", model, compile=compiled)
    a, b = step(one), step(other)
    assert abs(a.loss - b.loss) < 1e-5 and abs(a.grad_norm - b.grad_norm) < 1e-4 * a.grad_norm
    for name, values in parameters(one).items():
        np.testing.assert_allclose(parameters(other)[name], values, rtol=1e-4, atol=1e-5, err_msg=name)


def divided_batch() -> Batch:
    batch = token_batch(shape=(ROWS, TIME))
    batch.document_starts = some_starts(TIME)
    return batch


@pytest.mark.skipif(len(FRAMEWORKS) < 2, reason="compares two frameworks")
@pytest.mark.parametrize(("model", "compiled"), [("gpt", True), ("mistral", False)])
def test_long_documents_train_alike_in_both_frameworks(model: str, compiled: bool) -> None:
    one, other = long_trainable("torch", model), long_trainable("tensorflow", model, compile=compiled)
    a, b = (trainable.train_step([divided_batch()], 0.1, 0) for trainable in (one, other))
    assert abs(a.loss - b.loss) < 1e-5 and abs(a.grad_norm - b.grad_norm) < 1e-4 * a.grad_norm
    for name, values in parameters(one).items():
        np.testing.assert_allclose(parameters(other)[name], values, rtol=1e-4, atol=1e-5, err_msg=name)
    undivided = step(long_trainable("torch", model))
    assert abs(undivided.loss - a.loss) > 1e-3


@pytest.mark.skipif("torch" not in FRAMEWORKS, reason="PyTorch keeps the masks")
@pytest.mark.parametrize("model", ["gpt", "mistral"])
@pytest.mark.parametrize("options", [{}, {"precision": "bf16"}, {"activation_checkpointing": True}], ids=str)
def test_all_layers_keep_one_mask_of_documents(model: str, options: dict[str, Any]) -> None:
    trainable = long_trainable("torch", model, **options)
    trainable._config.data.document_masks = True
    trainable.train_step([divided_batch()], 0.1, 0)
    predicted = closed_form(trainable._config, trainable._spec, Mesh(1, 1, 1), 0)
    assert predicted is not None
    assert trainable.memory()["activations"] == pytest.approx(predicted.memory["activations"], rel=0.02)


@both_frameworks
@pytest.mark.parametrize("model", ["gpt", "llama", "mistral"])
def test_rows_of_any_length_are_predicted(framework: str, model: str) -> None:
    """TensorFlow's graph is traced for open lengths by the second one."""
    trainable, batch = long_trainable(framework, model), token_batch(shape=(ROWS, TIME))
    whole = trainable.predict(batch)
    for time in (TIME - 1, 150, 12, 3):
        shorter = trainable.predict(Batch(batch.inputs[:, :time], batch.targets[:, :time]))
        np.testing.assert_allclose(shorter, whole[:, :time], rtol=1e-4, atol=1e-5)
