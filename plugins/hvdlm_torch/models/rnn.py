"""Recurrent models in torch: the equations of ``hvdlm.models.rnn``, by torch's own fused layers.

Where tensor ranks share a layer, each computes its hidden units, and after every time step they tell each other.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from hvdlm.models.rnn import RNNSettings
from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm_torch.collectives import Collectives

Carry = list[tuple[torch.Tensor, ...]]  # of every layer: h, and c of an LSTM, each [rows, hidden]
_LAYERS = {"rnn": torch.rnn_tanh, "gru": torch.gru, "lstm": torch.lstm}


def _kernels(device: str) -> contextlib.AbstractContextManager[Any]:
    """Leave oneDNN out where it has no recurrent layer in half precision for this processor: it fails then."""
    if device != "cpu" or not torch.is_autocast_enabled("cpu") or _onednn_runs(torch.get_autocast_dtype("cpu")):
        return contextlib.nullcontext()
    return torch.backends.mkldnn.flags(enabled=False)


@functools.cache
def _onednn_runs(dtype: torch.dtype) -> bool:
    """Return whether an LSTM in ``dtype`` can be trained as it is."""
    try:
        with torch.enable_grad():
            x, state = torch.ones(1, 2, 8), (torch.ones(1, 1, 8), torch.ones(1, 1, 8))
            weights = [torch.ones(32, 8, requires_grad=True) for _ in range(2)]
            torch.lstm(x, state, [*weights, *(torch.ones(32) for _ in range(2))], True, 1, 0.0, True, False, True)
    except RuntimeError:
        return False
    return dtype is not None


class RNN:
    """A recurrent language model over parameters by name."""

    def __init__(self, settings: RNNSettings, model_shard: ModelShard, collectives: Collectives) -> None:
        self.s, self._model_shard, self._c = settings, model_shard, collectives
        cells: dict[str, Callable[..., Any]] = {"rnn": _tanh, "gru": _gru, "lstm": _lstm}
        self._cell = cells[settings.cell]

    def bind(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Take these tensors as parameters."""
        self._p = dict(parameters)
        self._head: Any = self._p.get("embed.tokens" if self.s.tie_embeddings else "head.weight")

    def hidden(
        self, tokens: torch.Tensor, x: torch.Tensor | None, carry: Carry | None, training: bool, checkpointing: bool
    ) -> tuple[torch.Tensor, Carry]:
        """Return what this stage makes of ``tokens``, ``[rows, time, embed]``, and its state after the last one.

        ``x``: what the stage before made of them, in the first stage None. The state is cut from the graph.
        """
        carry = self.cache(len(tokens), tokens.device) if carry is None else carry
        if x is None:
            x = self._c.enter(self._c.leave(self._c.embedding(tokens, self._p["embed.tokens"]), "embed"), "embed")
            x = self._dropout(x, training)
        layer = self._layer if self._c.size == 1 else self._shared_layer
        after: Carry = []
        for number, state in zip(self._model_shard.layers, carry, strict=True):
            if checkpointing and training:
                x, *last = checkpoint(layer, x, number, state, use_reentrant=False)
            else:
                x, *last = layer(x, number, state)
            after.append(tuple(t.detach() for t in last))
            x = self._dropout(x, training)
        return x, after

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits ``[..., vocab]`` of hidden states ``[..., embed]``: this rank's part of the vocabulary."""
        return F.linear(hidden, self._head, self._p["head.bias"])

    def cache(self, rows: int, device: torch.device) -> Carry:
        """Return the zero state of this rank's layers and hidden units."""
        zeros = torch.zeros(rows, self.s.width // self._model_shard.tensor, device=device)
        return [(zeros,) * self.s.carries for _ in self._model_shard.layers]

    def extend(self, tokens: torch.Tensor, x: torch.Tensor | None, cache: Carry) -> tuple[torch.Tensor, Carry]:
        """Return what this stage makes of tokens that follow the state ``cache``; see ``hidden``."""
        return self.hidden(tokens, x, cache, False, False)

    def _layer(self, x: torch.Tensor, index: int, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        p, name = self._p, f"layers.{index}"
        weights = [p[f"{name}.{part}.weight"].flatten(1).t() for part in ("input", "recurrent")]  # [gates*hidden, in]
        biases = [p[f"{name}.{part}.bias"].flatten() for part in ("input", "recurrent")]
        first = tuple(t.unsqueeze(0).to(x.dtype) for t in state)
        hx = first if self.s.cell == "lstm" else first[0]
        with _kernels(x.device.type):
            out, *last = _LAYERS[self.s.cell](x, hx, [*weights, *biases], True, 1, 0.0, False, False, True)
        return (out, *(t.squeeze(0) for t in last))

    def _shared_layer(self, x: torch.Tensor, number: int, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        p, name = self._p, f"layers.{number}"
        w, r = (p[f"{name}.{part}.weight"] for part in ("input", "recurrent"))  # [inputs, gates, hidden / ranks]
        b_w, b_r = (p[f"{name}.{part}.bias"] for part in ("input", "recurrent"))
        a = torch.einsum("bti,igh->btgh", x, w) + b_w
        state = tuple(t.to(x.dtype) for t in state)
        h, outputs = self._c.join(state[0], f"{number}.hidden"), []
        for now in a.unbind(1):
            b = torch.einsum("bi,igh->bgh", h, r) + b_r
            state = self._cell(now.unbind(1), b.unbind(1), *state)
            h = self._c.join(state[0], f"{number}.hidden")
            outputs.append(h)
        return (torch.stack(outputs, 1), *state)

    def _dropout(self, x: torch.Tensor, training: bool) -> torch.Tensor:
        return F.dropout(x, self.s.dropout) if training and self.s.dropout else x

    def carry_arrays(self, carry: Carry) -> dict[str, np.ndarray]:
        """Return {layer.which: float32 ``[rows, hidden / ranks]``} of a carried state."""
        return {
            f"{i}.{j}": t.float().cpu().numpy()
            for i, state in zip(self._model_shard.layers, carry, strict=True)
            for j, t in enumerate(state)
        }

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

        return [tuple(tensor(i, j) for j in range(self.s.carries)) for i in self._model_shard.layers]


def _tanh(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], h: torch.Tensor) -> tuple[torch.Tensor]:
    return (torch.tanh(a[0] + b[0]),)


def _gru(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], h: torch.Tensor) -> tuple[torch.Tensor]:
    r, z = torch.sigmoid(a[0] + b[0]), torch.sigmoid(a[1] + b[1])
    n = torch.tanh(a[2] + r * b[2])
    return ((1.0 - z) * n + z * h,)


def _lstm(
    a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], h: torch.Tensor, c: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    i, f, g, o = (left + right for left, right in zip(a, b, strict=True))
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c
