"""Products of the PyTorch plugin: equal to PyTorch's own by every kernel, with their gradients."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from builders import configured_spec, single_rank_trainable, small_config, token_batch
from hvdlm_torch import kernels

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
ROWS, INPUTS, OUTPUTS = (3, 96), 24, 40  # 288 rows: above all thresholds


@pytest.fixture(params=[pytest.param("onednn", marks=needs_onednn), "default"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Have products computed by a kernel; return the calls of oneDNN."""
    calls: list[Any] = []
    product = kernels._product
    monkeypatch.setattr(kernels, "ONEDNN_IS_FASTER", request.param == "onednn")
    monkeypatch.setattr(kernels, "_product", lambda *arguments: calls.append(arguments) or product(*arguments))
    yield calls
    assert bool(calls) == (request.param == "onednn")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def outcome(outputs: Sequence[torch.Tensor], leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the outputs, and the gradients of the leaves for a random gradient of the outputs."""
    gradients = [random(*y.shape, seed=9 + i).detach() for i, y in enumerate(outputs)]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, leaves, gradients))


def assert_equal(ours: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 1e-6) -> None:
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("product", "shape"), [("linear", (INPUTS, OUTPUTS)), ("linear_rows", (OUTPUTS, INPUTS))])
def test_a_product_and_its_gradients_are_pytorchs(
    kernel: list[Any], product: str, shape: tuple[int, int], biased: bool
) -> None:
    x, weight, bias = random(*ROWS, INPUTS), random(*shape, seed=1), random(OUTPUTS, seed=2) if biased else None
    leaves = [t for t in (x, weight, bias) if t is not None]
    plain = F.linear(x, weight.t() if product == "linear" else weight, bias)
    assert_equal(outcome([getattr(kernels, product)(x, weight, bias)], leaves), outcome([plain], leaves))


@pytest.mark.parametrize("view", [lambda x: x.transpose(0, 1), lambda x: x[..., : INPUTS // 2], lambda x: x[:, ::2]])
def test_strided_activations_are_multiplied(kernel: list[Any], view: Callable[..., Any]) -> None:
    x = random(*ROWS, INPUTS)
    weight = random(view(x).shape[-1], OUTPUTS, seed=1)
    ours, plain = (outcome([f(view(x), weight)], [x, weight]) for f in (kernels.linear, torch.matmul))
    assert_equal(ours, plain)


@pytest.mark.parametrize("biased", [True, False])
def test_joined_products_are_those_of_each_weight(kernel: list[Any], biased: bool) -> None:
    x, widths = random(*ROWS, INPUTS), (OUTPUTS, 8, 8)
    weights = [random(INPUTS, width, seed=width + i) for i, width in enumerate(widths)]
    biases = [random(width, seed=width) for width in widths] if biased else []
    plain = [F.linear(x, w.t(), b) for w, b in zip(weights, biases or [None] * 3, strict=True)]
    leaves = [x, *weights, *biases]
    assert_equal(outcome(kernels.linear_joined(x, weights, biases), leaves), outcome(plain, leaves))


def test_a_frozen_weight_gets_no_gradient(kernel: list[Any]) -> None:
    x, weight = random(*ROWS, INPUTS), random(INPUTS, OUTPUTS, seed=1).detach()
    kernels.linear(x, weight).sum().backward()
    assert x.grad is not None and weight.grad is None
    if kernel:
        assert len(kernel) == 2  # the product, and the gradient of x


def test_the_same_product_has_the_same_bits(kernel: list[Any]) -> None:
    leaves = [random(*ROWS, INPUTS), random(INPUTS, OUTPUTS, seed=1)]
    first, second = (outcome([kernels.linear(*leaves)], leaves) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_onednn
def test_onednn_is_left_out_where_it_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows, bf16, a machine whose own kernel is as fast: ``_product`` is not called."""
    monkeypatch.setattr(kernels, "_product", None)
    weight = random(INPUTS, OUTPUTS)
    monkeypatch.setattr(kernels, "ONEDNN_IS_FASTER", True)
    assert kernels.linear(random(16, INPUTS), weight).shape == (16, OUTPUTS)
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.linear(random(*ROWS, INPUTS), weight).dtype == torch.bfloat16
        assert kernels.linear_joined(random(*ROWS, INPUTS), [weight, weight])[1].dtype == torch.bfloat16
    monkeypatch.setattr(kernels, "ONEDNN_IS_FASTER", False)
    assert kernels.linear(random(*ROWS, INPUTS), weight).shape == (*ROWS, OUTPUTS)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_steps_reuse_the_memory_of_earlier_ones() -> None:
    config = small_config("torch", width=128)
    config.data.context = 64
    trainable = single_rank_trainable(configured_spec(config), config)
    batch = token_batch(shape=(8, 64))

    def train(first: int, last: int) -> int:
        """Return the page faults of some steps."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for step in range(first, last):
            trainable.train_step([batch], 1e-4, step)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    train(0, 5)
    assert train(5, 15) < 10 * 100  # glibc's defaults: 500 to 1,000 a step
