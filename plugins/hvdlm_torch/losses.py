"""Losses of whole rows, in torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def ctc(scores: torch.Tensor, lengths: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return minus log of the probability of every row's targets (Graves et al. 2006, eq. 8), float32 ``[rows]``.

    ``scores`` ``[rows, frames, vocab]`` up to ``lengths`` ``[rows]``, id 0 the blank; ``targets`` ``[rows, time]``
    where ``weights`` are 1. A row whose targets don't fit into its frames counts nothing.
    """
    logs, counts = F.log_softmax(scores, -1).transpose(0, 1), weights.sum(1).to(torch.int64)
    return F.ctc_loss(logs, targets, lengths.to(torch.int64), counts, reduction="none", zero_infinity=True)
