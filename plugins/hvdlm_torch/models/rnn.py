"""Recurrent models in torch: the equations of ``hvdlm.models.rnn``, by torch's own fused layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from hvdlm.models.rnn import RNNSettings

Carry = list[tuple[torch.Tensor, ...]]  # of every layer: h, and c of an LSTM, each [rows, hidden]
_LAYERS = {"rnn": torch.rnn_tanh, "gru": torch.gru, "lstm": torch.lstm}


class RNN:
    """A recurrent language model over parameters by name."""

    def __init__(self, settings: RNNSettings) -> None:
        self.s = settings

    def bind(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Take these tensors as parameters."""
        self._p = dict(parameters)
        self._head = self._p["embed.tokens" if self.s.tie_embeddings else "head.weight"]

    def hidden(
        self, tokens: torch.Tensor, carry: Carry | None, training: bool, checkpointing: bool
    ) -> tuple[torch.Tensor, Carry]:
        """Return hidden states ``[rows, time, embed]`` and the state after the last token, cut from the graph."""
        carry = self.cache(len(tokens), tokens.device) if carry is None else carry
        x = self._dropout(F.embedding(tokens, self._p["embed.tokens"]), training)
        after: Carry = []
        for index, state in enumerate(carry):
            if checkpointing and training:
                x, *last = checkpoint(self._layer, x, index, state, use_reentrant=False)
            else:
                x, *last = self._layer(x, index, state)
            after.append(tuple(t.detach() for t in last))
            x = self._dropout(x, training)
        return x, after

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits ``[..., vocab]`` of hidden states ``[..., embed]``."""
        return F.linear(hidden, self._head, self._p["head.bias"])

    def cache(self, rows: int, device: torch.device) -> Carry:
        """Return the zero state."""
        zeros = torch.zeros(rows, self.s.width, device=device)
        return [(zeros,) * self.s.carries for _ in range(self.s.layers)]

    def extend(self, tokens: torch.Tensor, cache: Carry) -> tuple[torch.Tensor, Carry]:
        """Return hidden states of tokens that follow the state ``cache``."""
        return self.hidden(tokens, cache, False, False)

    def _layer(self, x: torch.Tensor, index: int, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        p, name = self._p, f"layers.{index}"
        weights = [p[f"{name}.{part}.weight"].flatten(1).t() for part in ("input", "recurrent")]  # [gates*hidden, in]
        biases = [p[f"{name}.{part}.bias"].flatten() for part in ("input", "recurrent")]
        first = tuple(t.unsqueeze(0).to(x.dtype) for t in state)
        hx = first if self.s.cell == "lstm" else first[0]
        out, *last = _LAYERS[self.s.cell](x, hx, [*weights, *biases], True, 1, 0.0, False, False, True)
        return (out, *(t.squeeze(0) for t in last))

    def _dropout(self, x: torch.Tensor, training: bool) -> torch.Tensor:
        return F.dropout(x, self.s.dropout) if training and self.s.dropout else x

    def carry_arrays(self, carry: Carry) -> dict[str, np.ndarray]:
        """Return {layer.which: float32 ``[rows, hidden]``} of a carried state."""
        return {f"{i}.{j}": t.float().cpu().numpy() for i, state in enumerate(carry) for j, t in enumerate(state)}

    def carry_tensors(
        self, arrays: Mapping[str, np.ndarray], micro: int | None, device: torch.device
    ) -> dict[int, Carry]:
        """Return the carried state of every micro-batch of ``micro`` rows from that of all rows."""
        if not arrays:
            return {}
        rows = len(next(iter(arrays.values())))
        cuts = range(0, rows, micro or rows)
        return {
            number: self._slice(arrays, start, start + (micro or rows), device) for number, start in enumerate(cuts)
        }

    def _slice(self, arrays: Mapping[str, np.ndarray], start: int, stop: int, device: torch.device) -> Carry:
        def tensor(i: int, j: int) -> Any:
            return torch.from_numpy(arrays[f"{i}.{j}"][start:stop].copy()).to(device)

        return [tuple(tensor(i, j) for j in range(self.s.carries)) for i in range(self.s.layers)]
