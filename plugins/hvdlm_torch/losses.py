"""Losses of the last layer's output, in PyTorch."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from hvdlm_language.loss_terms import LossTerms
from hvdlm_torch.kernels import linear, linear_rows, missing_outputs

# Logits that are held at a time. On a GPU, chunks are large because each reads and writes the gradient of the whole
# head; on a CPU, freed memory of this size is reused (devices.py).
_CHUNK = {"cuda": 2**27, "cpu": 2**22}


def ctc(scores: torch.Tensor, lengths: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the CTC loss of every row (Graves et al. 2006, eq. 8), float32 ``[rows]``.

    That is minus the logarithm of the probability of its targets in any alignment with its frames. A row has
    ``lengths`` ``[rows]`` frames of ``scores`` ``[rows, frames, vocab]``, id 0 being the blank, and the ``targets``
    ``[rows, time]`` whose ``weights`` are 1. A row whose targets don't fit into its frames has loss 0.
    """
    logs = F.log_softmax(scores, -1).transpose(0, 1)  # [frames, rows, vocab]
    counts = weights.sum(1).to(torch.int64)
    return F.ctc_loss(logs, targets, lengths.to(torch.int64), counts, reduction="none", zero_infinity=True)


def rows_of_chunk(vocab: int, device: torch.device) -> int:
    """Return of how many targets ``chunked_cross_entropy`` computes the logits at a time."""
    return max(1, _CHUNK.get(device.type, _CHUNK["cuda"]) // vocab)


def chunked_cross_entropy(
    hidden: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    weights: torch.Tensor | None,
    terms: LossTerms,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the losses in nats, float32 ``[n]``, of ``targets`` ``[n]``, times their ``weights`` ``[n]``.

    The logits ``hidden @ head.t() + bias`` are never held as a whole: each chunk's are computed, and at once their
    gradients, as in Liger Kernel (Hsu et al. 2024). Gradients of more than the sum of the losses are refused.

    Args:
        hidden: ``[n, embed]``.
        head: ``[vocab, embed]``.
        bias: ``[vocab]``.
        targets: int64.
        weights: None: all 1.
        terms: what is added to the cross entropy.
        dtype: in which products are computed.
    """
    wanted = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, head, bias))
    return _ChunkedCrossEntropy.apply(hidden, head, bias, targets, weights, terms, dtype, wanted)


def chunked_evaluation(
    hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cross entropies in nats, float32 ``[n]``, and ``is_highest`` of ``targets`` ``[n]``; no gradients.

    The arguments are those of ``chunked_cross_entropy``.
    """
    vocab, rows = len(head), rows_of_chunk(len(head), hidden.device)
    table, table_bias = _padded(head, bias, missing_outputs(hidden, head), dtype)
    losses, highest = [], []
    for x, target in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = linear_rows(x.to(dtype), table, table_bias)[:, :vocab].float()
        losses.append(F.cross_entropy(logits, target, reduction="none"))
        highest.append(is_highest(logits, target))
    return torch.cat(losses), torch.cat(highest)


def is_highest(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return of which ``targets`` ``[n]`` no other token has higher ``scores`` ``[n, vocab]``, bool ``[n]``."""
    return scores.gather(1, targets.unsqueeze(1)).squeeze(1) >= scores.amax(1)


def _padded(
    head: torch.Tensor, bias: torch.Tensor | None, missing: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return head and bias in ``dtype``, with ``missing`` outputs more."""
    return F.pad(head.to(dtype), (0, 0, 0, missing)), None if bias is None else F.pad(bias.to(dtype), (0, missing))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Losses and, computed with them, the gradients of their sum; ``wanted``: of hidden, head, bias."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        weights: torch.Tensor | None,
        terms: LossTerms,
        dtype: torch.dtype,
        wanted: tuple[bool, bool, bool],
    ) -> torch.Tensor:
        vocab, missing = len(head), missing_outputs(hidden, head)
        table, table_bias = _padded(head, bias, missing, dtype)
        rows = rows_of_chunk(vocab, hidden.device)
        of_hidden = torch.empty_like(hidden) if wanted[0] else None
        of_head, of_bias = (torch.zeros_like(t) if w else None for t, w in zip((head, bias), wanted[1:], strict=True))
        losses = []
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            x, weight = hidden[chunk].to(dtype), None if weights is None else weights[chunk].unsqueeze(1)
            logits = linear_rows(x, table, table_bias)
            logits[:, vocab:] = -math.inf
            loss, gradient = _loss_and_gradient(logits, vocab, targets[chunk].unsqueeze(1), terms)
            del logits
            losses.append(loss if weight is None else loss * weight)
            if not any(wanted):
                continue
            gradient = gradient.to(dtype)
            if of_hidden is not None:
                of_x = linear(gradient, table)
                of_hidden[chunk] = of_x if weight is None else of_x * weight
            # Scaling rows of x scales those of the gradient, which are longer.
            if of_head is not None:
                of_head += linear(gradient.t(), x if weight is None else (x * weight).to(dtype))[:vocab]
            if of_bias is not None:
                of_bias += (gradient if weight is None else gradient * weight).sum(0, dtype=torch.float32)[:vocab]
        ctx.save_for_backward(of_hidden, of_head, of_bias)
        return torch.cat(losses).squeeze(1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        if any(gradient.stride()) and len(gradient) > 1:  # sum() expands one number to all losses
            raise RuntimeError("chunked_cross_entropy has gradients of the sum of its losses only")
        # In place: these tensors are as large as the head, and a second backward pass through them is refused.
        scaled = (None if t is None else t.mul_(gradient[0]) for t in ctx.saved_tensors)
        return *scaled, None, None, None, None, None


def _loss_and_gradient(
    logits: torch.Tensor, vocab: int, targets: torch.Tensor, terms: LossTerms
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses, float32 ``[n, 1]``, of ``targets`` ``[n, 1]``, and the gradients of their logits.

    Logits beyond ``vocab`` are minus infinity.
    """
    probabilities = F.softmax(logits, -1, dtype=torch.float32)
    # The largest logit and its probability, which is at least 1 / vocab, tell the logarithm of the sum exactly.
    log_sum = logits.amax(-1, keepdim=True).float() - probabilities.amax(-1, keepdim=True).log()
    smoothing = terms.smoothing
    losses = log_sum - (1.0 - smoothing) * logits.gather(1, targets).float()
    if terms.z_loss:
        losses += terms.z_loss * log_sum.square()
        probabilities *= 1.0 + 2.0 * terms.z_loss * log_sum
    if smoothing:
        losses -= smoothing * logits[:, :vocab].mean(-1, keepdim=True, dtype=torch.float32)
        probabilities[:, :vocab] -= smoothing / vocab
    # Not scatter_add_, which has no deterministic kernel on GPUs.
    probabilities.scatter_(1, targets, probabilities.gather(1, targets) - (1.0 - smoothing))
    return losses, probabilities
