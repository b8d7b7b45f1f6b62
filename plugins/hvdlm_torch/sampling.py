"""Tokens chosen from scores on the device, by temperature, top-k and top-p."""

from __future__ import annotations

import math

import torch

from hvdlm.protocols.inference import SamplingRule

_TINY = 1e-300  # the lowest temperature whose reciprocal is finite, with room: differences are 1e-45 or more


def choose(scores: torch.Tensor, uniform: torch.Tensor, rule: SamplingRule) -> torch.Tensor:
    """Return int32 ``[rows, draws]``, the tokens that ``SamplesTokens.sample`` chooses.

    ``scores``: float32 ``[rows, vocab]``; ``uniform``: float64 ``[rows, draws]``.
    """
    scores = scores[:, : rule.vocab]
    # NaN counts as the largest: the first score tells whether all are finite.
    if rule.temperature == 0:
        best = scores.argmax(-1, keepdim=True)
        return best.where(scores.gather(1, best) < math.inf, -1).int().expand(uniform.shape)
    falling, tokens = scores.sort(dim=-1, descending=True, stable=True)
    if rule.top_k:
        falling, tokens = falling[:, : rule.top_k], tokens[:, : rule.top_k]
    scaled = (falling.double() - falling[:, :1]) / max(rule.temperature, _TINY)
    sums = scaled.exp_().cumsum(-1)
    last = torch.full_like(tokens[:, :1], sums.shape[1] - 1)
    if rule.top_p < 1:
        last = torch.minimum(last, (sums < rule.top_p * sums[:, -1:]).sum(-1, keepdim=True))
    drawn = torch.searchsorted(sums, uniform * sums.gather(1, last), right=True)
    return tokens.gather(1, torch.minimum(drawn, last)).where(falling[:, :1] < math.inf, -1).int()
