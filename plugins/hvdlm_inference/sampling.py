"""Samples the next tokens by temperature, top-k and top-p."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hvdlm.errors import HvdlmError
from hvdlm.io.untrusted_input import shown
from hvdlm.protocols.inference import Inference, SamplingRule


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
        """Check types and ranges; numbers of numpy become Python's.

        Raises:
            HvdlmError: a value has another type, or is out of its range.
        """
        self.temperature = number("temperature", self.temperature, float)
        self.top_k = number("top_k", self.top_k, int)
        self.top_p = number("top_p", self.top_p, float)
        self.seed = number("seed", self.seed, int)
        if not 0 < self.top_p <= 1:
            raise HvdlmError(f"top_p is {self.top_p}, expected above 0 and at most 1.")

    def rule(self, vocab: int | None) -> SamplingRule:
        """Return how tokens below ``vocab`` (None: any) are chosen."""
        return SamplingRule(vocab, self.temperature, self.top_k, self.top_p)


def number(name: str, value: Any, kind: type, least: int = 0) -> Any:
    """Return ``value`` as a number of ``kind``, int or float.

    Raises:
        HvdlmError: it is of another type, not finite, or below ``least``.
    """
    if not isinstance(value, numbers.Integral if kind is int else numbers.Real):
        raise HvdlmError(f"{name} is {shown(repr(value))}, expected a {'whole ' if kind is int else ''}number.")
    result = kind(value)
    if not least <= result < math.inf:
        raise HvdlmError(f"{name} is {shown(result)}, expected {least} or more.")
    return result


class HostSampler:
    """Implements ``SamplesTokens`` on the host, from the scores of a framework that doesn't."""

    joins_caches = False

    def __init__(self, inference: Inference) -> None:
        self._inference = inference

    def sample(self, tokens: np.ndarray, cache: Any, uniform: np.ndarray, rule: SamplingRule) -> tuple[np.ndarray, Any]:
        """Return the tokens chosen from the scores after ``tokens``, and the extended cache."""
        scores, cache = self._inference.logits(tokens, cache)
        return choose(scores, uniform, rule), cache

    def join(self, caches: Sequence[Any], rows: np.ndarray) -> Any:
        """Refuse: ``logits`` and ``select`` don't suffice for it."""
        raise NotImplementedError


def choose(scores: np.ndarray, uniform: np.ndarray, rule: SamplingRule) -> np.ndarray:
    """Return int32 ``[rows, draws]``, the tokens that ``SamplesTokens.sample`` chooses.

    ``scores``: float32 ``[rows, vocab]``; ``uniform``: float64 ``[rows, draws]``.
    """
    scores = scores[:, : rule.vocab]
    finite = (scores < math.inf).all(1)
    if rule.temperature == 0:
        chosen = np.where(finite, scores.argmax(1), -1)[:, None]
        return np.broadcast_to(chosen, uniform.shape).astype(np.int32)
    tokens = np.argsort(-scores, 1, kind="stable")[:, : rule.top_k or None]
    falling = np.take_along_axis(scores, tokens, 1).astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # near temperature 0, all but the largest become minus infinity
        sums = np.exp((falling - falling[:, :1]) / rule.temperature).cumsum(1)
    last = np.full(len(scores), sums.shape[1] - 1)
    if rule.top_p < 1:
        last = np.minimum(last, (sums < rule.top_p * sums[:, -1:]).sum(1))
    chosen = np.full(uniform.shape, -1, np.int32)
    for row in np.flatnonzero(finite):
        drawn = np.searchsorted(sums[row], uniform[row] * sums[row, last[row]], side="right")
        chosen[row] = tokens[row, np.minimum(drawn, last[row])]
    return chosen
