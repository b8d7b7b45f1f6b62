"""Losses of whole rows, in PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def ctc(scores: torch.Tensor, lengths: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the CTC loss of every row (Graves et al. 2006, eq. 8), float32 ``[rows]``.

    That is minus the logarithm of the probability of its targets in any alignment with its frames. A row has
    ``lengths`` ``[rows]`` frames of ``scores`` ``[rows, frames, vocab]``, id 0 being the blank, and the ``targets``
    ``[rows, time]`` whose ``weights`` are 1. A row whose targets don't fit into its frames has loss 0.
    """
    logs = F.log_softmax(scores, -1).transpose(0, 1)  # [frames, rows, vocab]
    counts = weights.sum(1).to(torch.int64)
    return F.ctc_loss(logs, targets, lengths.to(torch.int64), counts, reduction="none", zero_infinity=True)
