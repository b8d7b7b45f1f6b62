"""GPT in torch: the equations of ``hvdlm.models.gpt``, in the same order.

A rank computes its pipeline stage's layers, and of a layer its tensor rank's heads and part of the MLP: its parameters
are already cut, so that only what joins the parts is said here (``collectives``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from hvdlm.errors import HvdlmError
from hvdlm.models.gpt import GPTSettings
from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm_torch.collectives import Collectives

Layer = Mapping[str, torch.Tensor]
# What computes outside of the matrix products, on a rank's own positions where they are shared.
_BETWEEN: tuple[str, ...] = ("attention_norm.scale", "attention_norm.bias", "attention.output.bias")
_BETWEEN += ("mlp_norm.scale", "mlp_norm.bias", "mlp.down.bias")
_KV = ("attention.key.", "attention.value.")


class Cache:
    """Keys and values ``[rows, kv_heads, context, head]`` of a rank's layers, filled up to ``length``."""

    def __init__(self, s: GPTSettings, layers: int, kv_heads: int, rows: int, device: torch.device) -> None:
        shape = (layers, 2, rows, kv_heads, s.context, s.head_width)
        self.store, self.length = torch.zeros(shape, device=device), 0

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``[rows, kv_heads, time, head]`` and return all keys and values so far."""
        stop = self.length + k.shape[2]
        self.store[layer, 0, :, :, self.length : stop] = k
        self.store[layer, 1, :, :, self.length : stop] = v
        return self.store[layer, 0, :, :, :stop], self.store[layer, 1, :, :, :stop]


class GPT:
    """A decoder-only Transformer over parameters by name."""

    def __init__(self, settings: GPTSettings, model_shard: ModelShard, collectives: Collectives) -> None:
        self.s, self._model_shard, self._collectives = settings, model_shard, collectives
        # Fewer key-value heads than ranks: all ranks hold all, each uses the one that its query heads need.
        self._few = settings.kv_heads % model_shard.tensor > 0
        self._kv_heads = 1 if self._few else settings.kv_heads // model_shard.tensor
        self._rotary: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def bind(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Take these tensors as parameters; a layer's are looked up once, here."""
        self._p = dict(parameters)
        prefixes = [f"layers.{i}." for i in self._model_shard.layers]
        self._layers = [{n[len(p) :]: t for n, t in self._p.items() if n.startswith(p)} for p in prefixes]
        self._head: Any = self._p.get("embed.tokens" if self.s.tie_embeddings else "head.weight")
        few = [name for name in self._layers[0] if self._few and name.startswith(_KV)]
        # What all ranks hold, but whose gradient each has only a part of: {positions shared: names}.
        self._partial = {False: few, True: few + [name for name in _BETWEEN if name in self._layers[0]]}

    def hidden(
        self, tokens: torch.Tensor, x: torch.Tensor | None, carry: Any, training: bool, checkpointing: bool
    ) -> tuple[torch.Tensor, None]:
        """Return what this stage makes of ``tokens`` ``[rows, time]``: ``[rows, time, embed]``; nothing is carried.

        ``x``: what the stage before made of them, in the first stage None; of the positions, perhaps only this rank's.
        """
        c = self._collectives.over(tokens.shape[1])
        x = self._embed(tokens, 0, training, c) if x is None else x
        for number, layer in zip(self._model_shard.layers, self._layers, strict=True):
            if checkpointing and training:
                x = checkpoint(self._layer, x, number, layer, training, None, c, use_reentrant=False)
            else:
                x = self._layer(x, number, layer, training, None, c)
        return self._finish(x, c), None

    def _finish(self, x: torch.Tensor, c: Collectives) -> torch.Tensor:
        if not self._model_shard.stage.last:
            return x
        names = [n for n in self._p if n.startswith("final_norm.")] if c.sequence else []
        return c.enter(self._norm(x, c.shared(self._p, names, "final"), "final_norm"), "head")

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits ``[..., vocab]`` of hidden states ``[..., embed]``: this rank's part of the vocabulary."""
        return F.linear(hidden, self._head)

    def cache(self, rows: int, device: torch.device) -> Cache:
        """Return an empty key-value cache."""
        return Cache(self.s, len(self._layers), self._kv_heads, rows, device)

    def extend(self, tokens: torch.Tensor, x: torch.Tensor | None, cache: Cache) -> tuple[torch.Tensor, Cache]:
        """Return what this stage makes of tokens that follow what the cache holds; see ``hidden``."""
        if cache.length + tokens.shape[1] > self.s.context:
            raise HvdlmError(f"{cache.length + tokens.shape[1]} tokens are more than the context of {self.s.context}.")
        c = self._collectives.alone()
        x = self._embed(tokens, cache.length, False, c) if x is None else x
        for number, layer in zip(self._model_shard.layers, self._layers, strict=True):
            x = self._layer(x, number, layer, False, cache, c)
        cache.length += tokens.shape[1]
        return self._finish(x, c), cache

    def _embed(self, tokens: torch.Tensor, start: int, training: bool, c: Collectives) -> torch.Tensor:
        x = c.leave(c.embedding(tokens, self._p["embed.tokens"]), "embed")
        if self.s.positions == "learned":
            p = c.shared(self._p, ["embed.positions"] if c.sequence else [], "positions")
            own = c.index * x.shape[1] if c.sequence else 0
            x = x + p["embed.positions"][start + own : start + own + x.shape[1]]
        return self._dropout(x, training)

    def _layer(
        self, x: torch.Tensor, number: int, p: Layer, training: bool, cache: Cache | None, c: Collectives
    ) -> torch.Tensor:
        p = c.shared(p, self._partial[c.sequence], str(number))
        h = c.enter(self._norm(x, p, "attention_norm"), f"{number}.attention")
        a = _joined(self._attention(h, number, p, cache), p, "attention.output", c, f"{number}.attention")
        x = x + self._dropout(a, training)
        h = c.enter(self._norm(x, p, "mlp_norm"), f"{number}.mlp")
        m = _joined(self._mlp(h, p), p, "mlp.down", c, f"{number}.mlp")
        return x + self._dropout(m, training)

    def _attention(self, h: torch.Tensor, number: int, p: Layer, cache: Cache | None) -> torch.Tensor:
        """Return what this rank's heads found, ``[rows, time, heads * head / ranks]``."""
        rows, time, _ = h.shape
        p = self._own_head(p) if self._few else p
        q, k, v = (_linear(h, p, f"attention.{part}") for part in ("query", "key", "value"))
        q, k, v = (t.view(rows, time, -1, self.s.head_width).transpose(1, 2) for t in (q, k, v))
        start = cache.length if cache else 0
        if self.s.positions == "rotary":
            q, k = self._rotate(q, start), self._rotate(k, start)
        mask = None
        if cache:
            k, v = cache.extend(number - self._model_shard.layers.start, k, v)
            mask = torch.ones(time, k.shape[2], dtype=torch.bool, device=h.device).tril(k.shape[2] - time)
        grouped = q.shape[1] != k.shape[1]
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=cache is None, enable_gqa=grouped)
        return a.transpose(1, 2).reshape(rows, time, -1)

    def _own_head(self, p: Layer) -> Layer:
        """Return ``p`` with the columns of the one key-value head that this rank's query heads use."""
        first = self._model_shard.index * self.s.kv_heads // self._model_shard.tensor * self.s.head_width
        own = slice(first, first + self.s.head_width)
        return {n: t[..., own] if n.startswith(_KV) else t for n, t in p.items()}

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
        """Return this rank's part of the inner layer, ``[rows, time, mlp / ranks]``."""
        up = _linear(h, p, "mlp.up")
        return (
            F.silu(_linear(h, p, "mlp.gate")) * up if self.s.activation == "swiglu" else F.gelu(up, approximate="tanh")
        )

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


def _joined(x: torch.Tensor, p: Layer, name: str, c: Collectives, label: str) -> torch.Tensor:
    """Return the product of ranks' parts ``[rows, time, inputs / ranks]`` with a weight of which each has its rows."""
    if c.size == 1:
        return _linear(x, p, name)
    found, bias = c.leave(F.linear(x, p[f"{name}.weight"].t()), label), p.get(f"{name}.bias")
    return found if bias is None else found + bias


def _linear(x: torch.Tensor, p: Layer, name: str) -> torch.Tensor:
    bias = p.get(f"{name}.bias")
    return F.linear(x, p[f"{name}.weight"].t(), bias)
