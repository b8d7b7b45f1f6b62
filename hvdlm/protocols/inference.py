"""Inference with a model, for generation and evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

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
