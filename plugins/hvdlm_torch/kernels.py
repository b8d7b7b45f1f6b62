"""Products of activations and weights, by the fastest kernels that PyTorch has for them.

PyTorch multiplies float32 matrices on x86 processors by MKL, which uses AVX-512 on Intel's processors only. On AMD's,
oneDNN, which is part of PyTorch too and multiplies bf16 there, is 1.4 to 2.3 times as fast from 32 rows on.

Without a twin: TensorFlow multiplies by Eigen and oneDNN on any processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

_FEWEST_ROWS = 32  # of a product with oneDNN, whose calls cost 15 microseconds: with 16 rows, MKL is as fast
_FEWEST_ROWS_JOINED = 256  # of a product with copied weights: with fewer, copying them costs more than it saves
_OUTPUTS_OF_GPUS = 64  # outputs of a product on a GPU are padded to a multiple: its kernels compute tiles


def _onednn_is_faster() -> bool:
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    cpu = Path("/proc/cpuinfo")
    known = has_both and hasattr(torch.ops.mkldnn, "_linear_pointwise") and cpu.exists()
    return known and "AuthenticAMD" in cpu.read_text()


# Whether float32 products on this machine's CPU are faster with oneDNN than with PyTorch's default.
ONEDNN_IS_FASTER = _onednn_is_faster()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``x`` ``[..., inputs]`` times ``weight`` ``[inputs, outputs]``, plus ``bias`` ``[outputs]``."""
    if _by_onednn(x, weight):
        return _OneDNN.apply(x, weight, bias, False)
    return F.linear(x, weight.t(), bias)


def linear_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``x`` ``[..., inputs]`` times the transpose of ``weight`` ``[outputs, inputs]``, plus ``bias``."""
    if _by_onednn(x, weight):
        return _OneDNN.apply(x, weight, bias, True)
    if missing := missing_outputs(x, weight):
        bias = None if bias is None else F.pad(bias, (0, missing))
        return F.linear(x, F.pad(_as_computed(weight), (0, 0, 0, missing)), bias)[..., :-missing]
    return F.linear(x, weight, bias)


def linear_joined(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor] = ()
) -> Sequence[torch.Tensor]:
    """Return the products of ``x`` ``[..., inputs]`` and each of ``weights``, computed as one product.

    ``biases``: one for each weight, or none.
    """
    if len(weights) == 1 or not _many_rows(x):
        return [linear(x, w, b) for w, b in zip(weights, biases or [None] * len(weights), strict=True)]
    joined_bias = torch.cat(list(biases)) if biases else None
    if torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling():
        product = linear(x, torch.cat([_as_computed(w) for w in weights], 1), joined_bias)
    else:
        product = _Joined.apply(x, joined_bias, *weights)
    return product.split([w.shape[1] for w in weights], -1)


def _as_computed(weight: torch.Tensor) -> torch.Tensor:
    """Return ``weight`` as autocast would convert it: before it is copied, which is less to copy."""
    device = weight.device.type
    return weight.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else weight


def missing_outputs(x: torch.Tensor, weight: torch.Tensor) -> int:
    """Return how many outputs a product with ``weight`` ``[outputs, inputs]`` should have more, for a GPU's kernels."""
    padded = x.device.type == "cuda" and x.numel() >= _FEWEST_ROWS_JOINED * x.shape[-1]
    return -len(weight) % _OUTPUTS_OF_GPUS if padded else 0


def _by_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        ONEDNN_IS_FASTER
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() >= _FEWEST_ROWS * x.shape[-1]
        and not torch.is_autocast_enabled("cpu")
    )


class _OneDNN(torch.autograd.Function):
    """A product with oneDNN; ``rows``: the weight is ``[outputs, inputs]``."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rows: bool) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rows = rows
        return _product(x, weight if rows else weight.t(), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = _product(gradient, weight.t() if ctx.rows else weight)
        outputs = gradient.reshape(-1, gradient.shape[-1])
        if ctx.needs_input_grad[1]:
            inputs = x.reshape(-1, x.shape[-1])
            left, right = (outputs, inputs) if ctx.rows else (inputs, outputs)
            of_weight = _product(left.t(), right.t())
        if ctx.needs_input_grad[2]:
            of_bias = outputs.sum(0)
        return of_x, of_weight, of_bias, None


class _Joined(torch.autograd.Function):
    """A product with joined weights ``[inputs, outputs]``, which are joined again for the backward pass, not kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, *weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, *weights)
        return joined_product(x, weights, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        x, *weights = ctx.saved_tensors
        of_x = gradient_of_inputs(gradient, weights) if ctx.needs_input_grad[0] else None
        return of_x, *gradients_of_weights(x, gradient, weights, ctx.needs_input_grad[1:])


def joined_product(
    x: torch.Tensor, weights: Sequence[torch.Tensor], bias: torch.Tensor | None = None, rows: bool = False
) -> torch.Tensor:
    """Return the products of ``x`` ``[..., inputs]`` and ``weights``, side by side, plus the joined ``bias``.

    ``rows``: there is one weight, ``[outputs, inputs]``; else they are ``[inputs, outputs]``.
    """
    if rows:
        return linear_rows(x, weights[0], bias)
    if len(weights) == 1 or _many_rows(x):
        return linear(x, _join(weights), bias)
    joined = torch.cat([linear(x, weight) for weight in weights], -1)
    return joined if bias is None else joined + bias


def gradient_of_inputs(gradient: torch.Tensor, weights: Sequence[torch.Tensor], rows: bool = False) -> torch.Tensor:
    """Return the gradient of the inputs of ``joined_product`` from that of its outputs; it has memory of its own."""
    if rows:
        return linear(gradient, weights[0])
    if len(weights) == 1 or _many_rows(gradient):
        return linear_rows(gradient, _join(weights))
    # The last first, as autograd adds them: in bf16, the order of a sum is seen in the losses.
    columns = gradient.split([w.shape[1] for w in weights], -1)
    first, *others = reversed(list(zip(columns, weights, strict=True)))
    total = linear_rows(*first)
    for of_outputs, weight in others:
        total += linear_rows(of_outputs, weight)
    return total


def gradients_of_weights(
    x: torch.Tensor,
    gradient: torch.Tensor,
    weights: Sequence[torch.Tensor],
    needed: Sequence[bool],
    rows: bool = False,
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of the bias and of each weight of ``joined_product``, from that of its outputs.

    ``needed``: of the bias and of each weight; without any weight's, none is computed.
    """
    outputs, inputs = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
    of_bias = outputs.sum(0) if needed[0] else None
    if not any(needed[1:]):
        return of_bias, *(None for _ in weights)
    if rows:
        return of_bias, linear(outputs.t(), inputs)
    return of_bias, *linear(inputs.t(), outputs).split([w.shape[1] for w in weights], 1)


def _join(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    return weights[0] if len(weights) == 1 else torch.cat(list(weights), 1)


def _many_rows(x: torch.Tensor) -> bool:
    """Return whether one product of ``x`` and joined weights is worth the copies of the weights."""
    return x.numel() >= _FEWEST_ROWS_JOINED * x.shape[-1]


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``x`` ``[..., inputs]`` times the transpose of ``weight`` ``[outputs, inputs]``, plus ``bias``."""
    return (torch.ops.hvdlm.product if torch.compiler.is_compiling() else _call_onednn)(x, weight, bias)


def _call_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# torch.compile multiplies by oneDNN frozen weights only: it has to take the call as it is. Without compilation, calling
# oneDNN directly is cheaper.
_LIBRARY = torch.library.Library("hvdlm", "FRAGMENT")
_LIBRARY.define("product(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_LIBRARY.impl("product", _call_onednn, "CPU")
torch.library.register_fake(
    "hvdlm::product", lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]), lib=_LIBRARY
)
