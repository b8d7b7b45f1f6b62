"""GPT in torch: the equations of ``hvdlm.models.gpt``, in the same order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from hvdlm.interfaces import HvdlmError
from hvdlm.models.gpt import GPTSettings

Layer = Mapping[str, torch.Tensor]


class Cache:
    """Keys and values ``[rows, kv_heads, context, head]`` of every layer, filled up to ``length``."""

    def __init__(self, s: GPTSettings, rows: int, device: torch.device) -> None:
        shape = (s.layers, 2, rows, s.kv_heads, s.context, s.head_width)
        self.store, self.length = torch.zeros(shape, device=device), 0

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``[rows, kv_heads, time, head]`` and return all keys and values so far."""
        stop = self.length + k.shape[2]
        self.store[layer, 0, :, :, self.length : stop] = k
        self.store[layer, 1, :, :, self.length : stop] = v
        return self.store[layer, 0, :, :, :stop], self.store[layer, 1, :, :, :stop]


class GPT:
    """A decoder-only Transformer over parameters by name."""

    def __init__(self, settings: GPTSettings) -> None:
        self.s = settings
        self._rotary: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def bind(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Take these tensors as parameters; a layer's are looked up once, here."""
        self._p = dict(parameters)
        prefixes = [f"layers.{i}." for i in range(self.s.layers)]
        self._layers = [{n[len(p) :]: t for n, t in self._p.items() if n.startswith(p)} for p in prefixes]
        self._head = self._p["embed.tokens" if self.s.tie_embeddings else "head.weight"]

    def hidden(
        self, tokens: torch.Tensor, carry: Any, training: bool, checkpointing: bool
    ) -> tuple[torch.Tensor, None]:
        """Return the last hidden states ``[rows, time, embed]`` of ``tokens`` ``[rows, time]``; nothing is carried."""
        x = self._embed(tokens, 0, training)
        for index, layer in enumerate(self._layers):
            if checkpointing and training:
                x = checkpoint(self._layer, x, index, layer, training, None, use_reentrant=False)
            else:
                x = self._layer(x, index, layer, training, None)
        return self._norm(x, self._p, "final_norm"), None

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits ``[..., vocab]`` of hidden states ``[..., embed]``."""
        return F.linear(hidden, self._head)

    def cache(self, rows: int, device: torch.device) -> Cache:
        """Return an empty key-value cache."""
        return Cache(self.s, rows, device)

    def extend(self, tokens: torch.Tensor, cache: Cache) -> tuple[torch.Tensor, Cache]:
        """Return hidden states ``[rows, time, embed]`` of tokens that follow what the cache holds."""
        if cache.length + tokens.shape[1] > self.s.context:
            raise HvdlmError(f"{cache.length + tokens.shape[1]} tokens are more than the context of {self.s.context}.")
        x = self._embed(tokens, cache.length, False)
        for index, layer in enumerate(self._layers):
            x = self._layer(x, index, layer, False, cache)
        cache.length += tokens.shape[1]
        return self._norm(x, self._p, "final_norm"), cache

    def _embed(self, tokens: torch.Tensor, start: int, training: bool) -> torch.Tensor:
        x = F.embedding(tokens, self._p["embed.tokens"])
        if self.s.positions == "learned":
            x = x + self._p["embed.positions"][start : start + tokens.shape[1]]
        return self._dropout(x, training)

    def _layer(self, x: torch.Tensor, index: int, p: Layer, training: bool, cache: Cache | None) -> torch.Tensor:
        h = self._norm(x, p, "attention_norm")
        x = x + self._dropout(self._attention(h, index, p, cache), training)
        h = self._norm(x, p, "mlp_norm")
        return x + self._dropout(self._mlp(h, p), training)

    def _attention(self, h: torch.Tensor, index: int, p: Layer, cache: Cache | None) -> torch.Tensor:
        rows, time, _ = h.shape
        q, k, v = (_linear(h, p, f"attention.{part}") for part in ("query", "key", "value"))
        q, k, v = (t.view(rows, time, -1, self.s.head_width).transpose(1, 2) for t in (q, k, v))
        start = cache.length if cache else 0
        if self.s.positions == "rotary":
            q, k = self._rotate(q, start), self._rotate(k, start)
        mask = None
        if cache:
            k, v = cache.extend(index, k, v)
            mask = torch.ones(time, k.shape[2], dtype=torch.bool, device=h.device).tril(k.shape[2] - time)
        grouped = self.s.kv_heads != self.s.heads
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=cache is None, enable_gqa=grouped)
        return _linear(a.transpose(1, 2).reshape(rows, time, -1), p, "attention.output")

    def _rotate(self, x: torch.Tensor, start: int) -> torch.Tensor:
        cos, sin = (t[start : start + x.shape[2]] for t in self._angles(x.device))  # [time, head]
        half = x.shape[-1] // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return (x * cos + turned * sin).to(x.dtype)

    def _angles(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if device not in self._rotary:
            power = torch.arange(0, self.s.head_width, 2, dtype=torch.float64) / self.s.head_width
            angle = torch.outer(torch.arange(self.s.context, dtype=torch.float64), self.s.rotary_base**-power)
            angle = torch.cat((angle, angle), dim=-1)
            self._rotary[device] = (angle.cos().float().to(device), angle.sin().float().to(device))
        return self._rotary[device]

    def _mlp(self, h: torch.Tensor, p: Layer) -> torch.Tensor:
        up = _linear(h, p, "mlp.up")
        m = F.silu(_linear(h, p, "mlp.gate")) * up if self.s.activation == "swiglu" else F.gelu(up, approximate="tanh")
        return _linear(m, p, "mlp.down")

    def _norm(self, x: torch.Tensor, p: Layer, name: str) -> torch.Tensor:
        scale, width = p[f"{name}.scale"], (self.s.width,)
        if self.s.norm == "rmsnorm":
            return F.rms_norm(x, width, scale, self.s.norm_epsilon)
        return F.layer_norm(x, width, scale, p.get(f"{name}.bias"), self.s.norm_epsilon)

    def _dropout(self, x: torch.Tensor, training: bool) -> torch.Tensor:
        return F.dropout(x, self.s.dropout) if training and self.s.dropout else x

    def carry_arrays(self, carry: None) -> dict[str, Any]:
        """Return nothing: a Transformer carries nothing from batch to batch."""
        return {}

    def carry_tensors(self, arrays: Mapping[str, Any], micro: int | None, device: torch.device) -> dict[int, Any]:
        """Return nothing."""
        return {}


def _linear(x: torch.Tensor, p: Layer, name: str) -> torch.Tensor:
    bias = p.get(f"{name}.bias")
    return F.linear(x, p[f"{name}.weight"].t(), bias)
