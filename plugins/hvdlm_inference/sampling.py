"""Samples the next token by temperature, top-k and top-p."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any

import numpy as np

from hvdlm.errors import HvdlmError
from hvdlm.io.untrusted_input import shown


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


def sample(logits: np.ndarray, sampling: Sampling, random: np.random.Generator) -> int:
    """Return a token sampled from float ``logits`` ``[vocab]``."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    chosen = logits[order].astype(np.float64)
    with np.errstate(over="ignore"):  # near temperature 0, all but the most probable are at minus infinity
        probabilities = np.exp((chosen - chosen.max()) / sampling.temperature)
    probabilities /= probabilities.sum()
    if sampling.top_p < 1:
        kept = int(np.searchsorted(np.cumsum(probabilities), sampling.top_p)) + 1
        order, probabilities = order[:kept], probabilities[:kept] / probabilities[:kept].sum()
    return int(order[random.choice(len(order), p=probabilities)])
