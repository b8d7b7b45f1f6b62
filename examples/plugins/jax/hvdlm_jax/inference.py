"""Inference: evaluation, scores of the next token, predictions."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hvdlm.errors import HvdlmError
from hvdlm.protocols.types import Batch
from hvdlm_jax.forward import Forward, Parameters, Tokens, tokens_of


class TextCache(NamedTuple):
    """The model's cache of ``length`` tokens."""

    length: int
    arrays: Any


class Inference:
    """The methods of ``Trainable`` that leave the parameters as they are. Each function is compiled once a shape."""

    def __init__(self, forward: Forward, flat: jax.Array, frozen: Parameters) -> None:
        self._forward = forward
        self._flat = flat
        self._frozen = frozen
        self._eval_carry: Any = None
        self._losses = jax.jit(self._trace_losses)
        self._extend = jax.jit(self._trace_extend, donate_argnums=(4,))
        self._scores = jax.jit(self._trace_scores)

    def eval_step(self, batch: Batch) -> tuple[float, float]:
        """Return (sum of losses in nats, valid tokens) of this rank's rows."""
        if batch.reset or self._eval_carry is None:
            self._eval_carry = self._forward.model.initial_carry(len(batch.inputs))
        total, self._eval_carry = self._losses(self._flat, self._frozen, tokens_of(batch), self._eval_carry)
        return float(total), batch.tokens

    def logits(self, tokens: np.ndarray, cache: TextCache | None = None) -> tuple[np.ndarray, TextCache]:
        """Return the scores of the next token, float32 ``[rows, vocab]``, and the cache extended by ``tokens``."""
        model, spec = self._forward.model, self._forward.spec
        cache = TextCache(0, model.empty_cache(len(tokens))) if cache is None else cache
        length = cache.length + tokens.shape[1]
        if length > getattr(spec.settings, "context", length):
            raise HvdlmError(f"{length} tokens are more than the model's context of {spec.settings.context}.")
        scores, arrays = self._extend(self._flat, self._frozen, tokens, np.int64(cache.length), cache.arrays)
        return np.asarray(scores), TextCache(length, arrays)

    def predict(self, batch: Batch) -> np.ndarray:
        """Return the scores of all positions of the batch, float32 ``[rows, time, vocab]``."""
        return np.asarray(self._scores(self._flat, self._frozen, batch.inputs))

    def read(self, batch: Batch) -> Any:
        """Refuse: no model of this framework reads features."""
        raise HvdlmError("framework jax has no model that reads features: --framework torch.")

    def select(self, cache: TextCache, rows: np.ndarray) -> TextCache:
        """Return the cache whose row i is row ``rows[i]`` of ``cache``."""
        return TextCache(cache.length, self._forward.model.select(cache.arrays, rows))

    def _trace_losses(self, flat: jax.Array, frozen: Parameters, batch: Tokens, carry: Any) -> tuple[jax.Array, Any]:
        weights = self._forward.weights(self._forward.parameters(flat), frozen)
        losses, carry = self._forward.losses(weights, batch, carry, None)
        return losses.sum(dtype=jnp.float64), carry

    def _trace_extend(
        self, flat: jax.Array, frozen: Parameters, tokens: jax.Array, start: jax.Array, arrays: Any
    ) -> tuple[jax.Array, Any]:
        weights = self._forward.weights(self._forward.parameters(flat), frozen)
        hidden, arrays = self._forward.model.extend(weights, tokens, start, arrays)
        return self._forward.model.scores(weights, hidden[:, -1]), arrays

    def _trace_scores(self, flat: jax.Array, frozen: Parameters, inputs: jax.Array) -> jax.Array:
        model, weights = self._forward.model, self._forward.weights(self._forward.parameters(flat), frozen)
        hidden, _ = model.hidden(weights, inputs, model.initial_carry(len(inputs)), None)
        return model.scores(weights, hidden)
