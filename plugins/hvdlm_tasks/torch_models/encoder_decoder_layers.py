"""Transformers that read beside writing, in torch: the equations of ``hvdlm_tasks.models.encoder_decoder_layers``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from hvdlm_tasks.models import encoder_decoder_layers

from hvdlm_torch.models.base import ModelBase

Parameters = Mapping[str, torch.Tensor]
KeysValues = tuple[torch.Tensor, torch.Tensor]  # each [rows, heads, keys, head]


class Reader(ModelBase):
    """A model that reads features and carries nothing from batch to batch: its layers, and what none of them needs."""

    def hidden(
        self, tokens: torch.Tensor, x: Any, carry: Any, training: bool, checkpointing: bool
    ) -> tuple[torch.Tensor, Any]:
        """Return what ``compute`` makes of the batch's features ``x``, and ``carry`` as it is."""
        return self.compute(tokens, x, training), carry

    def compute(self, tokens: torch.Tensor, x: Mapping[str, torch.Tensor], training: bool) -> torch.Tensor:
        """Return ``[rows, time, width]`` of ``tokens`` ``[rows, time]`` and the features ``x``."""
        raise NotImplementedError

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Return ``x`` ``[..., inputs]`` through a linear layer: ``[..., outputs]``."""
        return F.linear(x, self.p[f"{name}.weight"].t(), self.p[f"{name}.bias"])

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Return ``x`` ``[..., width]`` normalised."""
        scale, bias = self.p[f"{name}.scale"], self.p[f"{name}.bias"]
        return F.layer_norm(x, (self.s.width,), scale, bias, encoder_decoder_layers.EPSILON)

    def dropout(self, x: torch.Tensor, training: bool) -> torch.Tensor:
        """Return ``x``, parts of it dropped while training."""
        return F.dropout(x, self.s.dropout) if training and self.s.dropout else x

    def place(self, x: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Return ``x`` ``[rows, time, width]`` with the sinusoids of positions from ``start`` added."""
        table = encoder_decoder_layers.positions(start + x.shape[1], self.s.width)[start:]
        return x + torch.from_numpy(table).to(x.device, x.dtype)

    def keys_values(self, y: torch.Tensor, name: str) -> KeysValues:
        """Return the keys and values of ``y`` ``[rows, keys, width]``."""
        return self._heads(self.linear(y, f"{name}.key")), self._heads(self.linear(y, f"{name}.value"))

    def attend(self, x: torch.Tensor, kv: KeysValues, mask: torch.Tensor | None, name: str) -> torch.Tensor:
        """Return what ``x`` ``[rows, time, width]`` finds where ``mask`` is true, bool ``[rows, 1, time, keys]``."""
        q = self._heads(self.linear(x, f"{name}.query"))
        found = F.scaled_dot_product_attention(q, kv[0].to(q.dtype), kv[1].to(q.dtype), mask)
        return self.linear(found.transpose(1, 2).flatten(2), f"{name}.output")

    def mlp(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Return ``x`` ``[..., width]`` through a feed-forward layer."""
        return self.linear(F.relu(self.linear(x, f"{name}.up")), f"{name}.down")

    def encoder_layer(self, x: torch.Tensor, mask: torch.Tensor, name: str, training: bool) -> torch.Tensor:
        """Return ``x`` ``[rows, time, width]`` through a layer whose positions see those of ``mask``."""
        h = self.norm(x, f"{name}.attention_norm")
        h = self.attend(h, self.keys_values(h, f"{name}.attention"), mask, f"{name}.attention")
        x = x + self.dropout(h, training)
        return x + self.dropout(self.mlp(self.norm(x, f"{name}.mlp_norm"), f"{name}.mlp"), training)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.s.heads, -1)).transpose(1, 2)


def within(lengths: torch.Tensor, time: int) -> torch.Tensor:
    """Return which of ``time`` positions are below a row's length, bool ``[rows, 1, 1, time]``."""
    return (torch.arange(time, device=lengths.device) < lengths.unsqueeze(1))[:, None, None]
