"""Encoder and decoder in torch: the equations of ``hvdlm_tasks.models.seq2seq``, in the same order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hvdlm_tasks.torch_models.encoder_decoder_layers import KeysValues, Reader, within


class Cache(NamedTuple):
    """Keys and values of every decoder layer: of what was read, and of what has been written; and where padding is."""

    read: list[KeysValues]
    written: list[KeysValues]
    mask: torch.Tensor


class Seq2Seq(Reader):
    """A Transformer that writes what it has read in another language."""

    def compute(self, tokens: torch.Tensor, x: Mapping[str, torch.Tensor], training: bool) -> torch.Tensor:
        """Return ``[rows, time, width]`` of ``tokens`` ``[rows, time]`` that stand after the source ``x``."""
        read, mask = self._encode(x, training)
        time = tokens.shape[1]
        seen = torch.ones(time, time, dtype=torch.bool, device=tokens.device).tril()[None, None]
        y = self.dropout(self._embed(tokens, 0), training)
        for i in range(self.s.layers):
            kv = self.keys_values(read, f"decoder.{i}.reading")
            y, _ = self._layer(y, f"decoder.{i}", None, kv, seen, mask, training)
        return self.norm(y, "final_norm")

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits ``[..., vocab]`` of hidden states ``[..., width]``."""
        return F.linear(hidden, self.p["embed.tokens" if self.s.tie_embeddings else "head.weight"])

    def read(self, x: Mapping[str, torch.Tensor]) -> Cache:
        """Return what the decoder needs of the source, nothing written yet."""
        read, mask = self._encode(x, False)
        layers = range(self.s.layers)
        empty = read.new_zeros(len(read), self.s.heads, 0, self.s.width // self.s.heads)
        return Cache(
            [self.keys_values(read, f"decoder.{i}.reading") for i in layers], [(empty, empty)] * len(layers), mask
        )

    def select(self, cache: Cache, rows: torch.Tensor) -> Cache:
        """Return the cache of ``rows`` ``[n]``, in their order."""

        def chosen(kept: list[KeysValues]) -> list[KeysValues]:
            return [(k.index_select(0, rows), v.index_select(0, rows)) for k, v in kept]

        return Cache(chosen(cache.read), chosen(cache.written), cache.mask.index_select(0, rows))

    def extend(self, tokens: torch.Tensor, x: Any, cache: Cache) -> tuple[torch.Tensor, Cache]:
        """Return hidden states of one more token a row, ``tokens`` ``[rows, 1]``, and the grown cache."""
        y, written = self._embed(tokens, cache.written[0][0].shape[2]), []
        for i, (before, read) in enumerate(zip(cache.written, cache.read, strict=True)):
            y, grown = self._layer(y, f"decoder.{i}", before, read, None, cache.mask, False)
            written.append(grown)
        return self.norm(y, "final_norm"), Cache(cache.read, written, cache.mask)

    def _encode(self, x: Mapping[str, torch.Tensor], training: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what was read ``[rows, S, width]``, and its mask."""
        mask = within(x["source_length"], x["source"].shape[1])
        h = self.dropout(self._embed(x["source"], 0), training)
        for i in range(self.s.layers):
            h = self.encoder_layer(h, mask, f"encoder.{i}", training)
        return self.norm(h, "encoder_norm"), mask

    def _embed(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        return self.place(F.embedding(tokens, self.p["embed.tokens"]) * self.s.width**0.5, start)

    def _layer(
        self,
        y: torch.Tensor,
        name: str,
        before: KeysValues | None,
        read: KeysValues,
        seen: torch.Tensor | None,
        mask: torch.Tensor,
        training: bool,
    ) -> tuple[torch.Tensor, KeysValues]:
        """Return ``y`` through a decoder's layer, and keys and values of what was written ``before`` and of ``y``."""
        h = self.norm(y, f"{name}.attention_norm")
        written = self.keys_values(h, f"{name}.attention")
        if before is not None:
            written = (torch.cat([before[0], written[0]], 2), torch.cat([before[1], written[1]], 2))
        y = y + self.dropout(self.attend(h, written, seen, f"{name}.attention"), training)
        h = self.attend(self.norm(y, f"{name}.reading_norm"), read, mask, f"{name}.reading")
        y = y + self.dropout(h, training)
        return y + self.dropout(self.mlp(self.norm(y, f"{name}.mlp_norm"), f"{name}.mlp"), training), written
