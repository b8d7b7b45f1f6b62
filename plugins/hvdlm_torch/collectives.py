"""The collectives of tensor parallelism within a layer, through which gradients flow.

``enter`` and ``leave`` are f and g of Shoeybi et al. 2019, figure 3; under sequence parallelism they become g and
g-bar of Korthikanti et al. 2022, figure 5. With one tensor rank all are the identity.

Activations and their gradients are sent in the precision of the layers' products: under autocast in bf16 or fp16. A sum
over n ranks is then rounded up to n - 1 times, by at most half a unit in the last place of a partial sum each.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm.protocols.group import Converted, Group, Handle
from hvdlm_language.loss_terms import LossTerms
from hvdlm_language.tensor_ranks import TensorRanks
from hvdlm_torch.kernels import (
    gradient_of_inputs,
    gradients_of_weights,
    joined_product,
    linear_joined,
    linear_rows,
    missing_outputs,
)
from hvdlm_torch.losses import is_highest
from hvdlm_torch.operations import TracedGroup


class Collectives(TensorRanks):
    """The collectives of one tensor group."""

    def __init__(self, group: Group, model_shard: ModelShard, sequence: bool | None = None) -> None:
        super().__init__(group, model_shard, sequence)
        self.group: Any = TracedGroup(group)

    def enter(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Return ``x`` ``[rows, time, embed]``, the input of a column-parallel product; its gradient is summed."""
        if self.size == 1:
            return x
        return (_GatherTime if self.sequence else _SumGradient).apply(_sent(x), self.group, f"tensor.{name}")

    def columns(
        self, x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor], name: str
    ) -> Sequence[torch.Tensor]:
        """Return the products of ``enter(x)`` ``[rows, time, embed]`` and this rank's columns of several weights.

        In the backward pass, the sum of the gradient of ``x`` travels while those of the weights are computed, as in
        Megatron-LM (``LinearWithGradAccumulationAndAsyncCommunication``).

        Args:
            x: the input; with ``sequence``, this rank's positions.
            weights: ``[embed, outputs / ranks]``.
            biases: one for each weight, or none.
            name: of the collectives.
        """
        if not self._overlaps(x):
            return linear_joined(self.enter(x, name), weights, biases)
        bias = torch.cat([_sent(bias) for bias in biases]) if biases else None
        product = _Columns.apply(
            _sent(x), self.group, f"tensor.{name}", self.sequence, False, bias, *map(_sent, weights)
        )
        return product.split([weight.shape[1] for weight in weights], -1)

    def scores(
        self, x: torch.Tensor, table: torch.Tensor, bias: torch.Tensor | None = None, name: str = "head"
    ) -> torch.Tensor:
        """Return the product of ``enter(x)`` and this rank's range of the vocabulary; see ``columns``.

        ``table``: ``[vocab / ranks, embed]``; ``bias``: ``[vocab / ranks]``.
        """
        if not self._overlaps(x):
            return linear_rows(self.enter(x, name), table, bias)
        table, missing = _sent(table), missing_outputs(x, table)
        if missing:
            table, bias = F.pad(table, (0, 0, 0, missing)), None if bias is None else F.pad(bias, (0, missing))
        bias = None if bias is None else _sent(bias)
        scores = _Columns.apply(_sent(x), self.group, f"tensor.{name}", self.sequence, True, bias, table)
        return scores[..., :-missing] if missing else scores

    def _overlaps(self, x: torch.Tensor) -> bool:
        """Return whether a backward pass can send the gradient of ``x`` in the background.

        In compiled steps, operations end in the order in which they are called.
        """
        return self.size > 1 and torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def leave(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Return the sum over ranks of ``x`` ``[rows, time, embed]``; with ``sequence``, this rank's positions."""
        if self.size == 1:
            return x
        return (_ScatterTime if self.sequence else _Sum).apply(_sent(x), self.group, f"tensor.{name}").to(x.dtype)

    def join(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Return ``[rows, hidden]`` from ranks' ``x`` ``[rows, hidden / ranks]``; the gradients of it are summed."""
        return _Join.apply(_sent(x), self.group, f"tensor.{name}").to(x.dtype)

    def shared(self, p: Mapping[str, torch.Tensor], names: Collection[str], name: str) -> Mapping[str, torch.Tensor]:
        """Return ``p``, of whose replicated parameters ``names`` the gradients are summed, in one all-reduce."""
        if not names:
            return p
        parameters = _SumGradients.apply(self.group, f"tensor.{name}.shared", *(p[n] for n in names))
        return {**p, **dict(zip(names, parameters, strict=True))}

    def embedding(self, tokens: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Return rows of a table of which this rank holds a range, zeros for tokens outside of it."""
        if self.size == 1:
            return F.embedding(tokens, table)
        first, _ = self.model_shard.range_of(self.model_shard.vocab)
        local = tokens - first
        outside = (local < 0) | (local >= len(table))
        return F.embedding(local.masked_fill(outside, 0), table).masked_fill(outside.unsqueeze(-1), 0.0)

    def cross_entropy(self, scores: torch.Tensor, targets: torch.Tensor, terms: LossTerms) -> torch.Tensor:
        """Return losses ``[n]`` in nats from this rank's ``scores`` ``[n, vocab / ranks]`` and ``targets`` ``[n]``."""
        if self.size == 1:
            losses = F.cross_entropy(scores, targets, reduction="none", label_smoothing=terms.smoothing)
            return losses + terms.z_loss * scores.logsumexp(-1).square() if terms.z_loss else losses
        first, _ = self.model_shard.range_of(self.model_shard.vocab)
        return _CrossEntropy.apply(scores, targets - first, self.group, self.model_shard.vocab, terms)

    def evaluated(self, scores: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cross entropies ``[n]`` in nats of ``targets`` ``[n]``, and ``is_highest`` of them ``[n]``."""
        if self.size == 1:
            return F.cross_entropy(scores, targets, reduction="none"), is_highest(scores, targets)
        first, _ = self.model_shard.range_of(self.model_shard.vocab)
        figures = _Figures(scores, targets - first, self.group, LossTerms())
        return figures.log_sum - figures.score, figures.score >= figures.top

    def all_scores(self, scores: torch.Tensor) -> torch.Tensor:
        """Return ``[rows, vocab]`` from ranks' ``scores`` ``[rows, vocab / ranks]``."""
        if self.size == 1:
            return scores
        return self.group.all_gather(scores.t().contiguous(), "tensor.scores").t()


class _SumGradient(torch.autograd.Function):
    """f: the identity forward, an all-reduce backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: TracedGroup, name: str) -> torch.Tensor:
        ctx.collective = group, f"{name}.backward"
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        return _sum(gradient, *ctx.collective), None, None


class _Columns(torch.autograd.Function):
    """f or g, and the products behind it: weights' gradients are computed while that of the input is summed.

    The whole input is kept for the backward pass, also with ``sequence``: to keep a rank's positions, as Megatron-LM
    does, would gather them again, a quarter more traffic. Activation checkpointing keeps neither.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        group: TracedGroup,
        name: str,
        sequence: bool,
        rows: bool,
        bias: torch.Tensor | None,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        ctx.collective = group, f"{name}.backward"
        ctx.sequence, ctx.rows = sequence, rows
        whole = _gather(x, group, f"{name}.gather") if sequence else x
        ctx.save_for_backward(whole, *weights)
        return joined_product(whole, weights, bias, rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        x, *weights = ctx.saved_tensors
        under_way: Handle | None = None
        if ctx.needs_input_grad[0]:
            start = _start_scatter if ctx.sequence else _start_sum
            under_way = start(gradient_of_inputs(gradient, weights, ctx.rows), *ctx.collective)
        of_weights = gradients_of_weights(x, gradient, weights, ctx.needs_input_grad[5:], ctx.rows)
        return None if under_way is None else under_way.wait(), None, None, None, None, *of_weights


class _Sum(torch.autograd.Function):
    """g: an all-reduce forward, the identity backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: TracedGroup, name: str) -> torch.Tensor:
        return _sum(x, group, name)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        return gradient, None, None


class _GatherTime(torch.autograd.Function):
    """g of sequence parallelism: an all-gather of positions forward, a reduce-scatter backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: TracedGroup, name: str) -> torch.Tensor:
        ctx.collective = group, f"{name}.backward"
        return _gather(x, group, f"{name}.gather")

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        return _scatter(gradient, *ctx.collective), None, None


class _ScatterTime(torch.autograd.Function):
    """g-bar: a reduce-scatter of positions forward, an all-gather backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: TracedGroup, name: str) -> torch.Tensor:
        ctx.collective = group, f"{name}.backward"
        return _scatter(x, group, f"{name}.scatter")

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        return _gather(gradient, *ctx.collective), None, None


class _Join(torch.autograd.Function):
    """An all-gather of hidden units forward, a reduce-scatter backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: TracedGroup, name: str) -> torch.Tensor:
        ctx.collective = group, f"{name}.backward"
        return group.all_gather(x.t().contiguous(), name).t()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        group, name = ctx.collective
        return group.reduce_scatter(gradient.t().contiguous(), name).t(), None, None


class _SumGradients(torch.autograd.Function):
    """The identity of several parameters forward, one all-reduce of their gradients backward."""

    @staticmethod
    def forward(ctx: Any, group: TracedGroup, name: str, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.collective = group, name
        return tuple(p.view_as(p) for p in parameters)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        group, name = ctx.collective
        flat = torch.cat([g.flatten() for g in gradients])
        sums = group.all_reduce_async(flat, name).wait().split([g.numel() for g in gradients])
        return None, None, *(s.view_as(g) for s, g in zip(sums, gradients, strict=True))


class _Figures:
    """What the ranks know together of scores ``[n, vocab / ranks]`` that they share, without gathering them.

    Three figures of every target travel: a rank's largest score, its sum of exponentials relative to that, and the
    target's score, 0 where another rank has it. With smoothing, a fourth: the sum of the rank's scores.

    Attributes:
        local, here: the targets in this rank's range ``[n, 1]``, and which of them are in it ``[n]``.
        largest, exponentials: this rank's largest score ``[n]``, and its scores' exponentials relative to that.
        top, total, log_sum, score, sums: of all ranks ``[n]``: the largest score, the sum of exponentials relative to
            it, the logarithm of the sum of exponentials, the target's score; with smoothing the sum of scores.
    """

    def __init__(self, scores: torch.Tensor, targets: torch.Tensor, group: TracedGroup, terms: LossTerms) -> None:
        self.here = (targets >= 0) & (targets < scores.shape[1])
        self.local = targets.masked_fill(~self.here, 0).unsqueeze(1)
        self.largest = scores.amax(1)
        self.exponentials = (scores - self.largest.unsqueeze(1)).exp()
        target_score = scores.gather(1, self.local).squeeze(1) * self.here
        figures = [self.largest, self.exponentials.sum(1), target_score]
        figures += [scores.sum(1)] if terms.smoothing else []
        # [ranks, figure, n]
        gathered = group.all_gather(torch.stack(figures), "tensor.cross_entropy").view(-1, len(figures), len(scores))
        self.top = gathered[:, 0].amax(0)
        self.total = (gathered[:, 1] * (gathered[:, 0] - self.top).exp()).sum(0)
        self.log_sum = self.total.log() + self.top
        self.score = gathered[:, 2].sum(0)
        self.sums = gathered[:, 3].sum(0) if terms.smoothing else None


class _CrossEntropy(torch.autograd.Function):
    """Cross entropy of scores that the ranks share."""

    @staticmethod
    def forward(
        ctx: Any, scores: torch.Tensor, targets: torch.Tensor, group: TracedGroup, vocab: int, terms: LossTerms
    ) -> torch.Tensor:
        figures = _Figures(scores, targets, group, terms)
        losses = figures.log_sum - (1.0 - terms.smoothing) * figures.score
        ctx.spread = terms.smoothing / vocab
        if figures.sums is not None:
            losses -= ctx.spread * figures.sums
        factor = (figures.largest - figures.top).exp() / figures.total
        if terms.z_loss:
            losses += terms.z_loss * figures.log_sum.square()
            factor *= 1.0 + 2.0 * terms.z_loss * figures.log_sum
        ctx.save_for_backward(figures.exponentials.mul_(factor.unsqueeze(1)), figures.local, figures.here)
        ctx.share = 1.0 - terms.smoothing
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        probabilities, local, here = ctx.saved_tensors
        of_scores = (probabilities - ctx.spread if ctx.spread else probabilities) * gradient.unsqueeze(1)
        of_scores.scatter_add_(1, local, -ctx.share * (gradient * here).unsqueeze(1))
        return of_scores, None, None, None, None


def _sent(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` in the precision in which it is sent: that of the layers' products under the present autocast."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def _sum(x: torch.Tensor, group: TracedGroup, name: str) -> torch.Tensor:
    """Return the sum over ranks, of a copy: sums are computed in place."""
    return _start_sum(x.clone(memory_format=torch.contiguous_format), group, name).wait()


def _start_sum(x: torch.Tensor, group: TracedGroup, name: str) -> Handle:
    """Start the sum over ranks, which may overwrite ``x``."""
    # A copy where a GPU's padded product was cut to the width: Horovod refuses what isn't contiguous.
    return group.all_reduce_async(x.contiguous(), name)


def _scatter(x: torch.Tensor, group: TracedGroup, name: str) -> torch.Tensor:
    """Return this rank's positions ``[rows, time / ranks, embed]`` of the sum of ranks' ``[rows, time, embed]``."""
    return group.reduce_scatter(_time_first(x), name).transpose(0, 1)


def _start_scatter(x: torch.Tensor, group: TracedGroup, name: str) -> Handle:
    """Start ``_scatter``."""
    return Converted(group.reduce_scatter_async(_time_first(x), name), lambda shard: shard.transpose(0, 1))


def _gather(x: torch.Tensor, group: TracedGroup, name: str) -> torch.Tensor:
    """Return ``[rows, time, embed]`` from ranks' positions ``[rows, time / ranks, embed]``."""
    return group.all_gather(_time_first(x), name).transpose(0, 1)


def _time_first(x: torch.Tensor) -> torch.Tensor:
    """Return ``[time, rows, embed]`` of ``[rows, time, embed]``, since collectives cut the first dimension."""
    return x.transpose(0, 1).contiguous()
