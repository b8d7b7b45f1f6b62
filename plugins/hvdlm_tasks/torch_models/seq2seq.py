"""Sequence-to-sequence Transformer in PyTorch: the equations of ``hvdlm_tasks.models.seq2seq``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from hvdlm_tasks.torch_models.encoder_decoder_layers import EncoderBase, KeysValues, valid_positions
from hvdlm_torch.kernels import linear_rows


class Cache(NamedTuple):
    """Keys and values of every decoder layer, of the encoder's output and of the tokens so far; the source's mask."""

    source: list[KeysValues]
    target: list[KeysValues]
    mask: torch.Tensor


class Seq2Seq(EncoderBase):
    """An encoder and a decoder, which attends to the encoder's output."""

    def compute(self, tokens: torch.Tensor, x: Mapping[str, torch.Tensor], training: bool) -> torch.Tensor:
        """Return ``[rows, time, width]`` of ``tokens`` ``[rows, time]`` given the source in ``x``."""
        encoded, mask = self._encode(x, training)
        time = tokens.shape[1]
        causal = torch.ones(time, time, dtype=torch.bool, device=tokens.device).tril()[None, None]
        y = self.dropout(self._embed(tokens, 0), training)
        for i in range(self.s.layers):
            source = self.keys_values(encoded, f"decoder.{i}.reading")
            y, _ = self._layer(y, f"decoder.{i}", None, source, causal, mask, training)
        return self.norm(y, "final_norm")

    def bind(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Use these tensors as parameters."""
        super().bind(parameters)
        self._table = self.p["embed.tokens" if self.s.tie_embeddings else "head.weight"]
        self.head = self._table, None

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits ``[..., vocab]`` of hidden states ``[..., width]``."""
        return linear_rows(hidden, self._table)

    def read(self, x: Mapping[str, torch.Tensor]) -> Cache:
        """Encode the source; return the decoder's cache without tokens."""
        encoded, mask = self._encode(x, False)
        layers = range(self.s.layers)
        empty = encoded.new_zeros(len(encoded), self.s.heads, 0, self.s.width // self.s.heads)
        return Cache(
            [self.keys_values(encoded, f"decoder.{i}.reading") for i in layers], [(empty, empty)] * len(layers), mask
        )

    def select(self, cache: Cache, rows: torch.Tensor) -> Cache:
        """Return the cache's ``rows`` ``[n]``, in this order."""

        def selected(layers: list[KeysValues]) -> list[KeysValues]:
            return [(k.index_select(0, rows), v.index_select(0, rows)) for k, v in layers]

        return Cache(selected(cache.source), selected(cache.target), cache.mask.index_select(0, rows))

    def extend(self, tokens: torch.Tensor, x: Any, cache: Cache) -> tuple[torch.Tensor, Cache]:
        """Return the hidden states of the next token of every row, ``tokens`` ``[rows, 1]``, and the extended cache."""
        y = self._embed(tokens, cache.target[0][0].shape[2])
        target = []
        for i, (past, source) in enumerate(zip(cache.target, cache.source, strict=True)):
            y, extended = self._layer(y, f"decoder.{i}", past, source, None, cache.mask, False)
            target.append(extended)
        return self.norm(y, "final_norm"), Cache(cache.source, target, cache.mask)

    def _encode(self, x: Mapping[str, torch.Tensor], training: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the encoder's output ``[rows, S, width]``, and the padding mask."""
        mask = valid_positions(x["source_length"], x["source"].shape[1])
        h = self.dropout(self._embed(x["source"], 0), training)
        for i in range(self.s.layers):
            h = self.encoder_layer(h, mask, f"encoder.{i}", training)
        return self.norm(h, "encoder_norm"), mask

    def _embed(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        return self.add_positions(F.embedding(tokens, self.p["embed.tokens"]) * self.s.width**0.5, start)

    def _layer(
        self,
        y: torch.Tensor,
        name: str,
        past: KeysValues | None,
        source: KeysValues,
        causal: torch.Tensor | None,
        mask: torch.Tensor,
        training: bool,
    ) -> tuple[torch.Tensor, KeysValues]:
        """Apply a decoder layer to ``y``; return also the keys and values of the ``past`` tokens and of ``y``."""
        h = self.norm(y, f"{name}.attention_norm")
        target = self.keys_values(h, f"{name}.attention")
        if past is not None:
            target = (torch.cat([past[0], target[0]], 2), torch.cat([past[1], target[1]], 2))
        y = y + self.dropout(self.attend(h, target, causal, f"{name}.attention"), training)
        h = self.attend(self.norm(y, f"{name}.reading_norm"), source, mask, f"{name}.reading")
        y = y + self.dropout(h, training)
        return y + self.dropout(self.mlp(self.norm(y, f"{name}.mlp_norm"), f"{name}.mlp"), training), target
