"""Texts generated in a batch: the tokens of each alone, stop tokens, sampling on the device."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from builders import CONTEXT, FRAMEWORKS, VOCAB, both_frameworks, small_trainable, token_batch, train_steps
from hvdlm.errors import HvdlmError
from hvdlm.protocols.inference import SamplesTokens, SamplingRule
from hvdlm_inference import sampling
from hvdlm_inference.decoding import Text, decode
from hvdlm_inference.generation import generate, prompts_of
from hvdlm_inference.sampling import Sampling

MODELS = ["gpt", "llama", "lstm"]
PROMPTS = [[1, 2, 3], [7], [4, 5, 6, 7, 8], [1, 2, 3], list(range(20)), [9, 9, 9], [11] * CONTEXT]
RULES = [Sampling(temperature=1.0), Sampling(temperature=0.0), Sampling(0.7, top_k=5), Sampling(1.3, top_p=0.6)]


def reference(scores: np.ndarray, chosen: Sampling, random: np.random.Generator) -> int:
    """Return a token by numpy's own sampler of a distribution."""
    if chosen.temperature == 0:
        return int(scores.argmax())
    order = np.argsort(-scores, kind="stable")[: chosen.top_k or None]
    kept = scores[order].astype(np.float64)
    with np.errstate(over="ignore"):
        p = np.exp((kept - kept.max()) / chosen.temperature)
    p /= p.sum()
    if chosen.top_p < 1:
        count = int(np.searchsorted(np.cumsum(p), chosen.top_p)) + 1
        order, p = order[:count], p[:count] / p[:count].sum()
    return int(order[random.choice(len(order), p=p)])


def alone(trainable: Any, prompt: list[int], count: int, context: int, chosen: Sampling) -> list[int]:
    """Return a text of one row, token by token from ``logits``; a full cache is filled anew with its last half."""
    random, tokens = np.random.default_rng(chosen.seed), list(prompt)
    read = tokens[-context:]
    cache, length = None, 0
    for _ in range(count):
        scores, cache = trainable.logits(np.array([read], np.int32), cache)
        length += len(read)
        tokens.append(reference(scores[0], chosen, random))
        read = tokens[-1:]
        if length == context:
            cache, length, read = None, 0, tokens[-max(1, context // 2) :]
    return tokens[len(prompt) :]


def in_a_batch(
    inference: Any, count: int, context: int, chosen: Sampling, batch_size: int, stop: tuple[int, ...] = ()
) -> list[list[int]]:
    """Return the generated tokens of PROMPTS, the seeds of which count from 1."""
    texts = [Text(np.int32(prompt), count, seed) for seed, prompt in enumerate(PROMPTS, 1)]
    for _ in decode(inference, texts, context, chosen.rule(VOCAB), batch_size, stop):
        pass
    assert not any(text.left for text in texts)
    return [text.generated for text in texts]


def context_of(model: str) -> int:
    return sys.maxsize if model == "lstm" else CONTEXT


@both_frameworks
@pytest.mark.parametrize("model", [*MODELS, "mistral"])
def test_a_batch_has_the_tokens_of_each_text_alone(framework: str, model: str) -> None:
    """Prompts of several lengths, two of them equal, one beyond the context; some texts wait for others to end."""
    options: dict[str, Any] = {"window": 5, "rotary_share": 0.5} if model == "mistral" else {}
    trainable = small_trainable(framework, model, initial_scale=0.5, kv_heads=2, **options)
    context = context_of(model)
    assert isinstance(trainable, SamplesTokens) and trainable.joins_caches
    for chosen in RULES[: 4 if framework == "torch" else 1]:
        expected = [
            alone(trainable, prompt, 30, context, Sampling(chosen.temperature, chosen.top_k, chosen.top_p, seed))
            for seed, prompt in enumerate(PROMPTS, 1)
        ]
        for batch_size in (5, 1):
            assert in_a_batch(trainable, 30, context, chosen, batch_size) == expected
        if chosen.temperature:
            assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)


@both_frameworks
@pytest.mark.parametrize("model", ["gpt", "lstm"])
def test_a_stop_token_ends_its_text_only(framework: str, model: str) -> None:
    trainable, context = small_trainable(framework, model, initial_scale=0.5), context_of(model)
    chosen = Sampling(temperature=1.0)
    whole = in_a_batch(trainable, 25, context, chosen, 4)
    stop = whole[0][2], whole[2][9]
    expected = [tokens[: next((i for i, t in enumerate(tokens, 1) if t in stop), 25)] for tokens in whole]
    assert in_a_batch(trainable, 25, context, chosen, 4, stop) == expected
    assert len({len(tokens) for tokens in expected}) > 2


@pytest.mark.parametrize("model", MODELS)
def test_a_framework_without_sampling_generates_alike(model: str) -> None:
    """Of a framework that has 'logits' alone, texts of the same length are computed together."""
    trainable, context = small_trainable("torch", model, initial_scale=0.5), context_of(model)
    calls = []

    def logits(tokens: np.ndarray, cache: Any = None) -> Any:
        calls.append(len(tokens))
        return trainable.logits(tokens, cache)

    only: Any = SimpleNamespace(logits=logits)
    for stop in ((), (3, 4, 5, 6)):
        expected = in_a_batch(trainable, 20, context, Sampling(1.0, top_p=0.9), 5, stop)
        assert in_a_batch(only, 20, context, Sampling(1.0, top_p=0.9), 5, stop) == expected
    assert max(calls) == 3


def rows_of_scores() -> Iterator[np.ndarray]:
    random = np.random.default_rng(5)
    for scale in (0.1, 1.0, 30.0):
        yield (scale * random.normal(size=(64, VOCAB))).astype(np.float32)
    yield random.integers(0, 4, (64, VOCAB)).astype(np.float32)  # of equal scores, the order counts
    yield np.full((64, VOCAB), -3e38, np.float32)


def chosen_by(framework: str, scores: np.ndarray, uniform: np.ndarray, rule: SamplingRule) -> np.ndarray:
    if framework == "host":
        return sampling.choose(scores, uniform, rule)
    if framework == "torch":
        import torch

        from hvdlm_torch.sampling import choose

        return choose(torch.from_numpy(scores), torch.from_numpy(uniform), rule).numpy()
    import tensorflow as tf

    from hvdlm_tensorflow.sampling import choose as choose_in_tensorflow

    return choose_in_tensorflow(tf.constant(scores), tf.constant(uniform), rule).numpy()


@pytest.mark.parametrize("framework", ["host", *FRAMEWORKS])
@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"top_k": 7}, {"top_p": 0.53}, {"top_k": 9, "top_p": 0.83}])
def test_tokens_are_those_that_numpy_draws(framework: str, options: dict[str, Any]) -> None:
    for temperature in (0.0, 1e-320, 0.8, 2.0):
        chosen = Sampling(temperature, **options)
        for scores in rows_of_scores():
            randoms = [np.random.default_rng(row) for row in range(len(scores))]
            expected = [
                [reference(of_row[:47], chosen, random) for _ in range(2)]
                for of_row, random in zip(scores, randoms, strict=True)
            ]
            uniform = np.stack([np.random.default_rng(row).random(2) for row in range(len(scores))])
            tokens = chosen_by(framework, scores, uniform, chosen.rule(47))
            assert tokens.dtype == np.int32 and tokens.tolist() == expected


@pytest.mark.parametrize("framework", ["host", *FRAMEWORKS])
@pytest.mark.parametrize("chosen", RULES, ids=str)
def test_scores_that_are_not_finite_give_no_token(framework: str, chosen: Sampling) -> None:
    scores = np.zeros((3, VOCAB), np.float32)
    scores[0, 4], scores[1, 5] = np.nan, np.inf
    tokens = chosen_by(framework, scores, np.full((3, 1), 0.999999), chosen.rule(VOCAB))
    assert tokens[:2, 0].tolist() == [-1, -1] and tokens[2, 0] >= 0


def test_a_diverged_model_generates_nothing() -> None:
    bad: Any = SimpleNamespace(logits=lambda tokens, cache: (np.full((len(tokens), VOCAB), np.nan, np.float32), None))
    with pytest.raises(HvdlmError, match="scores of the next token are not finite numbers"):
        list(generate(bad, np.int32([1]), 3, CONTEXT, Sampling()))


@both_frameworks
@pytest.mark.parametrize("model", ["gpt", "lstm"])
def test_texts_in_bf16_follow_the_parameters(framework: str, model: str) -> None:
    """They are rounded once, and anew after a step of training."""
    exact, half = (
        small_trainable(framework, model, precision=precision, initial_scale=0.5) for precision in ("fp32", "bf16")
    )
    tokens, states, scores = token_batch().inputs, [half.state()], []
    train_steps(half, 1, rate=0.1)
    states.append(half.state())
    for state in (states[1], states[0], states[1]):
        half.load_state(state)
        exact.load_state(state)
        scores.append(half.logits(tokens)[0])
        expected = exact.logits(tokens)[0]
        assert not np.array_equal(scores[-1], expected)
        np.testing.assert_allclose(scores[-1], expected, atol=0.1 * expected.std())
        assert len(in_a_batch(half, 9, 5, RULES[0], 7)[0]) == 9
    train_steps(half, 1, rate=0.1)
    after = half.logits(tokens)[0]
    assert np.array_equal(scores[0], scores[2]) and not np.allclose(scores[0], scores[1], atol=0.05)
    assert not np.allclose(after, scores[2], atol=0.05)


def test_prompts_may_be_lines() -> None:
    assert prompts_of("a\n\n b \n", True, "x") == ["a", " b "] and prompts_of("a\nb", False, "x") == ["a\nb"]
    with pytest.raises(HvdlmError, match="x: no line has a prompt"):
        prompts_of(" \n\n", True, "x")
