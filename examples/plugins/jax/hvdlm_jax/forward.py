"""The loss of a batch, as a pure function of the flat vector of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hvdlm.config import Config
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.flat_layout import FlatLayout
from hvdlm.protocols.types import Batch
from hvdlm_jax.gpt import GPT
from hvdlm_jax.rnn import RNN

KINDS: dict[str, Any] = {"gpt": GPT, "rnn": RNN}
Parameters = dict[str, jax.Array]


class Tokens(NamedTuple):
    """The arrays of a batch; see ``hvdlm.protocols.types.Batch``."""

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray | None


def tokens_of(batch: Batch) -> Tokens:
    """Return the arrays of a batch."""
    return Tokens(batch.inputs, batch.targets, batch.weights)


class Forward:
    """The forward pass, shared by training (``trainable.py``) and inference (``inference.py``)."""

    def __init__(self, spec: ModelSpec, layout: FlatLayout, config: Config) -> None:
        self.spec = spec
        self._layout = layout
        self._smoothing = config.train.label_smoothing
        self._z_loss = config.train.z_loss
        kind = KINDS[spec.kind] if spec.kind in KINDS else spec.implementation("jax")
        self.model = kind(spec.settings, config.train.activation_checkpointing)

    def parameters(self, flat: jax.Array) -> Parameters:
        """Return the trained parameters by name, from the flat vector ``[size]``."""
        return {slot.name: flat[slot.start : slot.stop].reshape(slot.shape) for slot in self._layout.slots}

    def weights(self, trained: Parameters, frozen: Mapping[str, jax.Array]) -> Parameters:
        """Return what the model computes with: with adapters (``hvdlm.models.lora``), sums with frozen weights."""
        weights = {**trained, **frozen}
        for adapter in self.spec.adapters:
            weight, down, up = frozen[adapter.weight], trained[adapter.down], trained[adapter.up]
            product = down @ up.reshape(len(up), -1)
            weights[adapter.weight] = weight + adapter.factor * product.reshape(weight.shape)
        return weights

    def losses(self, weights: Parameters, batch: Tokens, carry: Any, key: jax.Array | None) -> tuple[jax.Array, Any]:
        """Return the losses in nats, float32 ``[rows, time]``, 0 where the target doesn't count; and the new carry.

        ``key``: seed of dropout in training; None: evaluation, without label smoothing and z-loss.
        """
        hidden, carry = self.model.hidden(weights, batch.inputs, carry, key)
        scores = self.model.scores(weights, hidden)
        logs = jax.nn.log_softmax(scores)
        losses = -jnp.take_along_axis(logs, batch.targets[..., None], -1)[..., 0]
        if key is not None and self._smoothing:
            losses = (1.0 - self._smoothing) * losses - self._smoothing * logs.mean(-1)
        if key is not None and self._z_loss:
            losses = losses + self._z_loss * jnp.square(jax.nn.logsumexp(scores, -1))
        return (losses if batch.weights is None else losses * batch.weights), carry
