"""Recurrent models in PyTorch: the equations of ``hvdlm_language.rnn``, by PyTorch's fused layers.

Tensor ranks that share a layer each compute some of its hidden units, and gather all after every time step.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm_language.rnn import RNNSettings
from hvdlm_torch.collectives import Collectives
from hvdlm_torch.dropout import DropoutMasks
from hvdlm_torch.kernels import linear_rows

Carry = list[tuple[torch.Tensor, ...]]  # of every layer: h, and c of an LSTM, each [rows, hidden / ranks]
_LAYERS = {"rnn": torch.rnn_tanh, "gru": torch.gru, "lstm": torch.lstm}


class RNN:
    """A recurrent language model over parameters by name.

    Attributes:
        head: of the last stage: the table ``[vocab, embed]`` of ``scores``, and its bias.
        masks: draws this rank's dropout masks.
    """

    masks: DropoutMasks
    own_masks = True

    def __init__(self, settings: RNNSettings, model_shard: ModelShard, collectives: Collectives) -> None:
        self.s = settings
        self._model_shard = model_shard
        self._c = collectives
        cells: dict[str, Callable[..., Any]] = {"rnn": _tanh, "gru": _gru, "lstm": _lstm}
        self._cell = cells[settings.cell]

    def bind(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Use these tensors as parameters."""
        self._p = dict(parameters)
        table: Any = self._p.get("embed.tokens" if self.s.tie_embeddings else "head.weight")
        self.head = table, self._p.get("head.bias")

    def hidden(
        self, tokens: torch.Tensor, x: torch.Tensor | None, carry: Carry, training: bool, checkpointing: bool
    ) -> tuple[torch.Tensor, Carry]:
        """Return this stage's activations ``[rows, time, embed]`` of ``tokens``, and its state after the last one.

        ``x``: those of the stage before, in the first stage None. No gradient flows through the state.
        """
        if x is None:
            x = self._c.enter(self._c.leave(self._c.embedding(tokens, self._p["embed.tokens"]), "embed"), "embed")
            x = self._dropout(x, training)
        layer = self._fused_layer if self._c.size == 1 else self._shared_layer
        after: Carry = []
        for number, state in zip(self._model_shard.layers, carry, strict=True):
            if checkpointing and training:
                x, *last = self.masks.recomputed(layer, x, number, state)
            else:
                x, *last = layer(x, number, state)
            after.append(tuple(t.detach() for t in last))
            x = self._dropout(x, training)
        return x, after

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits ``[..., vocab]`` of hidden states ``[..., embed]``: this rank's range of the vocabulary."""
        return linear_rows(hidden, *self.head)

    def initial_carry(self, rows: int, device: torch.device) -> Carry:
        """Return the state at the start of a text: zeros."""
        zeros = torch.zeros(rows, self.s.width // self._model_shard.tensor, device=device)
        return [(zeros,) * self.s.carries for _ in self._model_shard.layers]

    def cache(self, rows: int, device: torch.device) -> Carry:
        """Return the empty cache of decoding: the state at the start."""
        return self.initial_carry(rows, device)

    def check_length(self, cache: Carry, added: int) -> None:
        """Accept any number of tokens: a recurrent model has no longest context."""

    def extend(self, tokens: torch.Tensor, x: torch.Tensor | None, cache: Carry) -> tuple[torch.Tensor, Carry]:
        """Return this stage's activations of tokens that follow the state ``cache``; see ``hidden``."""
        return self.hidden(tokens, x, cache, False, False)

    def join(self, caches: Sequence[Carry], rows: torch.Tensor) -> Carry:
        """Return the cache whose row i is row ``rows[i]`` of ``caches``, whose rows are numbered in turn."""
        layers = zip(*caches, strict=True)
        return [
            tuple(torch.cat(states).index_select(0, rows) for states in zip(*layer, strict=True)) for layer in layers
        ]

    def carry_arrays(self, carry: Carry) -> dict[str, np.ndarray]:
        """Return {layer.index: float32 ``[rows, hidden / ranks]``} of a carried state."""
        return {
            f"{i}.{j}": t.float().cpu().numpy()
            for i, state in zip(self._model_shard.layers, carry, strict=True)
            for j, t in enumerate(state)
        }

    def carry_tensors(
        self, arrays: Mapping[str, np.ndarray], micro_rows: int | None, device: torch.device
    ) -> dict[int, Carry]:
        """Return the carried state of every micro-batch of ``micro_rows`` rows (None: all) from that of all rows."""
        if not arrays:
            return {}
        rows = len(next(iter(arrays.values())))
        step = micro_rows or rows
        return {
            number: self._carry_of_rows(arrays, slice(start, start + step), device)
            for number, start in enumerate(range(0, rows, step))
        }

    def _carry_of_rows(self, arrays: Mapping[str, np.ndarray], rows: slice, device: torch.device) -> Carry:
        def tensor(i: int, j: int) -> Any:
            return torch.from_numpy(arrays[f"{i}.{j}"][rows].copy()).to(device)

        return [tuple(tensor(i, j) for j in range(self.s.carries)) for i in self._model_shard.layers]

    def _fused_layer(self, x: torch.Tensor, number: int, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Return ``[rows, time, hidden]`` and the state after the last time step."""
        p, name = self._p, f"layers.{number}"
        weights = [p[f"{name}.{k}.weight"].flatten(1).t() for k in ("input", "recurrent")]  # [gates * hidden, inputs]
        biases = [p[f"{name}.{k}.bias"].flatten() for k in ("input", "recurrent")]
        first = tuple(t.unsqueeze(0).to(x.dtype) for t in state)
        hx = first if self.s.cell == "lstm" else first[0]
        with _without_unsupported_kernels(x.device.type):
            out, *last = _LAYERS[self.s.cell](x, hx, [*weights, *biases], True, 1, 0.0, False, False, True)
        return (out, *(t.squeeze(0) for t in last))

    def _shared_layer(self, x: torch.Tensor, number: int, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Return ``[rows, time, hidden]`` of all ranks, and this rank's state after the last time step."""
        p, name = self._p, f"layers.{number}"
        w, r = (p[f"{name}.{k}.weight"] for k in ("input", "recurrent"))  # [inputs, gates, hidden / ranks]
        b_w, b_r = (p[f"{name}.{k}.bias"] for k in ("input", "recurrent"))
        a = torch.einsum("bti,igh->btgh", x, w) + b_w  # of all time steps at once: one large product
        state = tuple(t.to(x.dtype) for t in state)
        h, outputs = self._c.join(state[0], f"{number}.hidden"), []
        for a_t in a.unbind(1):
            b = torch.einsum("bi,igh->bgh", h, r) + b_r
            state = self._cell(a_t.unbind(1), b.unbind(1), *state)
            h = self._c.join(state[0], f"{number}.hidden")
            outputs.append(h)
        return (torch.stack(outputs, 1), *state)

    def _dropout(self, x: torch.Tensor, training: bool) -> torch.Tensor:
        return self.masks.drop(x, self.s.dropout) if training and self.s.dropout else x


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


def _without_unsupported_kernels(device: str) -> contextlib.AbstractContextManager[Any]:
    """Disable oneDNN where it has no recurrent layer in half precision for this processor: it would raise then."""
    if device != "cpu" or not torch.is_autocast_enabled("cpu"):
        return contextlib.nullcontext()
    if _onednn_supports(torch.get_autocast_dtype("cpu")):
        return contextlib.nullcontext()
    return torch.backends.mkldnn.flags(enabled=False)


@functools.cache
def _onednn_supports(dtype: torch.dtype) -> bool:
    """Return whether an LSTM can be trained under the current autocast, to ``dtype`` (the key of the cache)."""
    try:
        with torch.enable_grad():
            x, state = torch.ones(1, 2, 8), (torch.ones(1, 1, 8), torch.ones(1, 1, 8))
            weights = [torch.ones(32, 8, requires_grad=True) for _ in range(2)]
            torch.lstm(x, state, [*weights, *(torch.ones(32) for _ in range(2))], True, 1, 0.0, True, False, True)
    except RuntimeError:
        return False
    return True
