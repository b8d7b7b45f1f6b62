"""Encoder and decoder layers in PyTorch: the equations of ``hvdlm_tasks.models.encoder_decoder_layers``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from hvdlm_tasks.models import encoder_decoder_layers as layers
from hvdlm_torch.kernels import linear, linear_joined
from hvdlm_torch.models.base import ModelBase

Parameters = Mapping[str, torch.Tensor]
KeysValues = tuple[torch.Tensor, torch.Tensor]  # each [rows, heads, keys, head]


class EncoderBase(ModelBase):
    """Base of models with an encoder: their layers. They carry no state from batch to batch."""

    own_masks = True

    def hidden(
        self, tokens: torch.Tensor, x: Any, carry: Any, training: bool, checkpointing: bool
    ) -> tuple[torch.Tensor, Any]:
        """Return ``compute`` of the batch's tokens and features ``x``, and ``carry`` unchanged."""
        return self.compute(tokens, x, training), carry

    def compute(self, tokens: torch.Tensor, x: Mapping[str, torch.Tensor], training: bool) -> torch.Tensor:
        """Return hidden states ``[rows, time, width]`` for ``tokens`` ``[rows, time]`` and the features ``x``."""
        raise NotImplementedError

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Apply a linear layer to ``x`` ``[..., inputs]``; return ``[..., outputs]``."""
        return linear(x, self.p[f"{name}.weight"], self.p[f"{name}.bias"])

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Apply layer normalisation to ``x`` ``[..., width]``."""
        scale, bias = self.p[f"{name}.scale"], self.p[f"{name}.bias"]
        return F.layer_norm(x, (self.s.width,), scale, bias, layers.EPSILON)

    def dropout(self, x: torch.Tensor, training: bool) -> torch.Tensor:
        """Apply dropout to ``x`` in training."""
        return self.masks.drop(x, self.s.dropout) if training and self.s.dropout else x

    def add_positions(self, x: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Add sinusoidal positions from ``start`` on to ``x`` ``[rows, time, width]``."""
        table = layers.positions(start + x.shape[1], self.s.width)[start:]
        return x + torch.from_numpy(table).to(x.device, x.dtype)

    def keys_values(self, y: torch.Tensor, name: str) -> KeysValues:
        """Return the keys and values of ``y`` ``[rows, keys, width]``."""
        names = (f"{name}.key", f"{name}.value")
        products = linear_joined(y, *([self.p[f"{n}.{kind}"] for n in names] for kind in ("weight", "bias")))
        return self._heads(products[0]), self._heads(products[1])

    def attend(self, x: torch.Tensor, kv: KeysValues, mask: torch.Tensor | None, name: str) -> torch.Tensor:
        """Attend from ``x`` ``[rows, time, width]`` to keys where ``mask``, bool ``[rows, 1, time, keys]``, is true."""
        q = self._heads(self.linear(x, f"{name}.query"))
        attended = F.scaled_dot_product_attention(q, kv[0].to(q.dtype), kv[1].to(q.dtype), mask)
        return self.linear(attended.transpose(1, 2).flatten(2), f"{name}.output")

    def mlp(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Apply a feed-forward layer to ``x`` ``[..., width]``."""
        return self.linear(F.relu(self.linear(x, f"{name}.up")), f"{name}.down")

    def encoder_layer(self, x: torch.Tensor, mask: torch.Tensor, name: str, training: bool) -> torch.Tensor:
        """Apply an encoder layer to ``x`` ``[rows, time, width]``; ``mask``: the positions attended to."""
        h = self.norm(x, f"{name}.attention_norm")
        h = self.attend(h, self.keys_values(h, f"{name}.attention"), mask, f"{name}.attention")
        x = x + self.dropout(h, training)
        return x + self.dropout(self.mlp(self.norm(x, f"{name}.mlp_norm"), f"{name}.mlp"), training)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.s.heads, -1)).transpose(1, 2)


def valid_positions(lengths: torch.Tensor, time: int) -> torch.Tensor:
    """Return the padding mask: true for positions below a row's length, bool ``[rows, 1, 1, time]``."""
    return (torch.arange(time, device=lengths.device) < lengths.unsqueeze(1))[:, None, None]
