"""What tensor ranks say to each other within a layer: collectives through which gradients flow.

``enter`` and ``leave`` are f and g of Shoeybi et al. 2019, figure 3; under sequence parallelism they become g and
g-bar of Korthikanti et al. 2022, figure 5. With one tensor rank all are the identity.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from hvdlm.parallel.tensor_parallel import TensorRanks
from hvdlm.protocols.group import Group


class Collectives(TensorRanks):
    """What is said within a tensor group."""

    def enter(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Return ``x`` ``[rows, time, embed]`` for a product whose outputs the ranks share: their gradients add up."""
        if self.size == 1:
            return x
        return (_GatherTime if self.sequence else _SumGradient).apply(x, self.group, f"tensor.{name}")

    def leave(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Return the sum of ranks' ``x`` ``[rows, time, embed]``; of the positions, perhaps only this rank's."""
        if self.size == 1:
            return x
        return (_ScatterTime if self.sequence else _Sum).apply(x, self.group, f"tensor.{name}")

    def join(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Return ranks' ``x`` ``[rows, hidden / ranks]`` side by side; each rank's gradient of it is a part of it."""
        return _Join.apply(x, self.group, f"tensor.{name}")

    def shared(self, p: Mapping[str, torch.Tensor], names: Collection[str], name: str) -> Mapping[str, torch.Tensor]:
        """Return ``p``; of parameters ``names``, which all ranks hold, the gradients add up, in one all-reduce."""
        if not names:
            return p
        found = _SumGradients.apply(self.group, f"tensor.{name}.shared", *(p[n] for n in names))
        return {**p, **dict(zip(names, found, strict=True))}

    def embedding(self, tokens: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Return rows of a table of which this rank has a range, zeros where a token is none of them."""
        if self.size == 1:
            return F.embedding(tokens, table)
        first, _ = self.model_shard.range_of(self.model_shard.vocab)
        own = tokens - first
        outside = (own < 0) | (own >= len(table))
        return F.embedding(own.masked_fill(outside, 0), table).masked_fill(outside.unsqueeze(-1), 0.0)

    def cross_entropy(self, scores: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
        """Return losses ``[n]`` in nats from this rank's ``scores`` ``[n, vocab / ranks]`` and ``targets`` ``[n]``.

        ``smoothing``: the share of a target that is spread over the whole vocabulary; 0 with several ranks.
        """
        if self.size == 1:
            return F.cross_entropy(scores, targets, reduction="none", label_smoothing=smoothing)
        first, _ = self.model_shard.range_of(self.model_shard.vocab)
        return _CrossEntropy.apply(scores, targets - first, self.group)

    def all_scores(self, scores: torch.Tensor) -> torch.Tensor:
        """Return ``[rows, vocab]`` from this rank's part of them."""
        if self.size == 1:
            return scores
        return self.group.all_gather(scores.t().contiguous(), "tensor.scores").t()


def _sum(x: torch.Tensor, group: Group, name: str) -> torch.Tensor:
    """Return the sum over ranks; ``x`` is kept, and half precision, which Horovod can't sum, travels as float32."""
    return group.all_reduce_async(x.to(torch.float32, copy=True).contiguous(), name).wait().to(x.dtype)


def _scatter(x: torch.Tensor, group: Group, name: str) -> torch.Tensor:
    """Return this rank's positions ``[rows, time / ranks, embed]`` of the sum of ranks' ``[rows, time, embed]``."""
    first = x.transpose(0, 1).float().contiguous()  # [time, rows, embed]
    return group.reduce_scatter(first, name).transpose(0, 1).to(x.dtype)


def _gather(x: torch.Tensor, group: Group, name: str) -> torch.Tensor:
    """Return ``[rows, time, embed]`` from ranks' positions ``[rows, time / ranks, embed]``."""
    first = x.transpose(0, 1).float().contiguous()
    return group.all_gather(first, name).transpose(0, 1).to(x.dtype)


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, name: str) -> torch.Tensor:
        ctx.where = group, f"{name}.backward"
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        return _sum(gradient, *ctx.where), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, name: str) -> torch.Tensor:
        return _sum(x, group, name)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        return gradient, None, None


class _GatherTime(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, name: str) -> torch.Tensor:
        ctx.where = group, f"{name}.backward"
        return _gather(x, group, f"{name}.gather")

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        return _scatter(gradient, *ctx.where), None, None


class _ScatterTime(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, name: str) -> torch.Tensor:
        ctx.where = group, f"{name}.backward"
        return _scatter(x, group, f"{name}.scatter")

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        return _gather(gradient, *ctx.where), None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, name: str) -> torch.Tensor:
        ctx.where = group, f"{name}.backward"
        return group.all_gather(x.t().float().contiguous(), name).t().to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        group, name = ctx.where
        return group.reduce_scatter(gradient.t().float().contiguous(), name).t().to(gradient.dtype), None, None


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Group, name: str, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.where = group, name
        return tuple(p.view_as(p) for p in parameters)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        group, name = ctx.where
        flat = torch.cat([g.flatten() for g in gradients])
        parts = group.all_reduce_async(flat, name).wait().split([g.numel() for g in gradients])
        return None, None, *(part.view_as(g) for part, g in zip(parts, gradients, strict=True))


class _CrossEntropy(torch.autograd.Function):
    """Of every target, ranks tell each other three figures: largest score, sum of exponentials, the target's score."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, targets: torch.Tensor, group: Group) -> torch.Tensor:
        here = (targets >= 0) & (targets < scores.shape[1])
        own = targets.masked_fill(~here, 0).unsqueeze(1)
        largest = scores.amax(1)
        exponentials = (scores - largest.unsqueeze(1)).exp()
        target = scores.gather(1, own).squeeze(1) * here
        said = group.all_gather(torch.stack([largest, exponentials.sum(1), target]), "tensor.cross_entropy")
        said = said.view(-1, 3, len(scores))  # [ranks, figure, n]
        top = said[:, 0].amax(0)
        total = (said[:, 1] * (said[:, 0] - top).exp()).sum(0)
        ctx.save_for_backward(exponentials.mul_(((largest - top).exp() / total).unsqueeze(1)), own, here)
        return total.log() + top - said[:, 2].sum(0)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        shares, own, here = ctx.saved_tensors
        found = shares * gradient.unsqueeze(1)
        found.scatter_add_(1, own, -(gradient * here).unsqueeze(1))
        return found, None, None
