"""Inference with a model, for generation and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from hvdlm.protocols.types import Batch

if TYPE_CHECKING:
    import numpy as np


class Inference(Protocol):
    """A model that computes scores (logits) of next tokens."""

    def logits(self, tokens: np.ndarray, cache: Any = None) -> tuple[np.ndarray, Any]:
        """Extend ``cache`` (None: start empty) by ``tokens`` int32 ``[rows, time]``.

        All ranks that hold a copy of the model call, with the same tokens.

        Returns:
            float32 ``[rows, vocab]``, the scores of the token after the last one; and the extended cache.
        """

    def predict(self, batch: Batch) -> np.ndarray:
        """Return the scores at every position of a batch, float32 ``[rows, time, vocab]``. No communication."""

    def read(self, batch: Batch) -> Any:
        """Encode the batch's features; return the cache from which ``logits`` decodes."""

    def select(self, cache: Any, rows: np.ndarray) -> Any:
        """Return a cache whose row i is row ``rows[i]`` of ``cache`` (for beam search)."""


class SamplingRule(NamedTuple):
    """How a token is chosen from its scores.

    Attributes:
        vocab: tokens from this one on are never chosen; None: all may be
        temperature: divisor of the scores; 0: the most probable token is chosen
        top_k: the number of most probable tokens that may be chosen; 0: all
        top_p: total probability of the most probable tokens that may be chosen (Holtzman et al. 2020); 1: all
    """

    vocab: int | None
    temperature: float
    top_k: int
    top_p: float


@runtime_checkable
class SamplesTokens(Protocol):
    """An ``Inference`` that samples on its device. Optional: of others, the host samples, from ``logits``.

    Attributes:
        joins_caches: whether ``join`` can be called of this model's caches. Without it, only texts of the same length
            are computed together.
    """

    joins_caches: bool

    def sample(self, tokens: np.ndarray, cache: Any, uniform: np.ndarray, rule: SamplingRule) -> tuple[np.ndarray, Any]:
        """Extend ``cache`` by ``tokens`` as ``logits`` does, and choose the tokens that follow.

        Of the tokens that may be chosen, in the order of falling scores and, where these are equal, of rising numbers,
        the first is chosen at which the sum of probabilities exceeds the uniform number: as
        ``numpy.random.Generator.choice`` does. Probabilities and their sums are float64.

        Args:
            tokens: int32 ``[rows, time]``
            cache: as of ``logits``
            uniform: float64 ``[rows, draws]``, at least 0 and below 1: for every token to be drawn
            rule: from which tokens, and how

        Returns:
            int32 ``[rows, draws]``, -1 where scores are not finite; and the extended cache.
        """

    def join(self, caches: Sequence[Any], rows: np.ndarray) -> Any:
        """Return the cache whose row i is row ``rows[i]`` of ``caches``, whose rows are numbered in turn.

        Its rows may hold different numbers of tokens.
        """
