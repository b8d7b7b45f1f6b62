"""Samples the next token by temperature, top-k and top-p."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hvdlm.errors import HvdlmError


@dataclass
class Sampling:
    """How the next token is sampled.

    Args:
        temperature: sampling temperature; 0: greedy
        top_k: sample from the k most probable tokens; 0: from all
        top_p: sample from the most probable tokens with this total probability (Holtzman et al. 2020); 1: from all
        seed: seed of the random numbers
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.temperature < 0:
            raise HvdlmError(f"temperature is {self.temperature}, expected 0 or more.")
        if self.top_k < 0:
            raise HvdlmError(f"top_k is {self.top_k}, expected 0 (all) or more.")
        if not 0 < self.top_p <= 1:
            raise HvdlmError(f"top_p is {self.top_p}, expected above 0 and at most 1.")


def sample(logits: np.ndarray, sampling: Sampling, random: np.random.Generator) -> int:
    """Return a token sampled from float ``logits`` ``[vocab]``."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    scaled = logits[order].astype(np.float64) / sampling.temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    if sampling.top_p < 1:
        kept = int(np.searchsorted(np.cumsum(probabilities), sampling.top_p)) + 1
        order, probabilities = order[:kept], probabilities[:kept] / probabilities[:kept].sum()
    return int(order[random.choice(len(order), p=probabilities)])
