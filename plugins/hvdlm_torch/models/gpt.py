"""GPT in PyTorch: the equations of ``hvdlm_language.gpt``, in the same order.

A rank computes the layers of its pipeline stage, and of each layer its tensor rank's heads and columns of the MLP. Its
parameters are cut already; only the collectives between the products show it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from hvdlm.errors import HvdlmError
from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm_language.context_ranks import ContextRanks
from hvdlm_language.gpt import GPTSettings, rotary_tables
from hvdlm_torch.attention import attend, attend_causally, causal_mask, document_masks
from hvdlm_torch.collectives import Collectives
from hvdlm_torch.context_attention import attend_over_ranks
from hvdlm_torch.dropout import DropoutMasks
from hvdlm_torch.gathered_layers import WholeLayers
from hvdlm_torch.kernels import linear

Layer = Mapping[str, torch.Tensor]
# Parameters of a layer that are used between the products, where sequence parallelism cuts the positions.
_BETWEEN: tuple[str, ...] = ("attention_norm.scale", "attention_norm.bias", "attention.output.bias")
_BETWEEN += ("mlp_norm.scale", "mlp_norm.bias", "mlp.down.bias")
_KV = ("attention.key.", "attention.value.")
_QK_NORMS = ("attention.query_norm.scale", "attention.key_norm.scale")


class Cache:
    """Keys and values of a rank's layers, each ``[rows, kv_heads, capacity, head]``.

    Attributes:
        lengths: the number of tokens in every row.
        start: position of the first token that is being added: of all rows, or int64 ``[rows]`` where they differ.
        mask: which keys the added tokens see, bool ``[time, keys]`` or ``[rows, 1, time, keys]``. None: all of them or,
            if ``causal``, those up to their own.
    """

    start: int | torch.Tensor
    mask: torch.Tensor | None
    causal: bool

    def __init__(self, layers: int, context: int, window: int, lengths: list[int], device: torch.device) -> None:
        self.lengths = lengths
        self._layers = layers
        self._context = context
        self._window = window
        self._device = device
        self._keys_values: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._capacity = self._stop = 0
        self._at: Any = None  # where rows of different lengths write: their numbers and positions

    def begin(self, time: int) -> None:
        """Prepare to add ``time`` tokens to every row."""
        first, self._stop = self.lengths[0], max(self.lengths) + time
        self.causal, self.mask, self._at = first == 0 and time > 1, None, None
        if self.lengths.count(first) == len(self.lengths):
            self.start = first
            if first and (time > 1 or 0 < self._window < self._stop):
                self.mask = causal_mask(time, self._stop, self._window, self._device)
            return
        self.causal = False
        self.start = torch.tensor(self.lengths, device=self._device)
        positions = self.start[:, None] + torch.arange(time, device=self._device)
        distance = positions[:, None, :, None] - torch.arange(self._stop, device=self._device)
        self.mask = (distance >= 0) & (distance < self._window) if self._window else distance >= 0
        self._at = torch.arange(len(self.lengths), device=self._device)[:, None], slice(None), positions

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add ``[rows, kv_heads, time, head]`` to the keys and values of a layer, and return all of them."""
        if self._stop > self._capacity:
            self._grow(k)
        keys, values = self._keys_values[layer]
        if self._at is None:
            keys.narrow(2, self.lengths[0], k.shape[2]).copy_(k)
            values.narrow(2, self.lengths[0], k.shape[2]).copy_(v)
        else:
            keys[self._at] = k.transpose(1, 2)
            values[self._at] = v.transpose(1, 2)
        return keys.narrow(2, 0, self._stop), values.narrow(2, 0, self._stop)

    def end(self, time: int) -> None:
        """Count the tokens that have been added."""
        self.lengths = [length + time for length in self.lengths]

    def _grow(self, like: torch.Tensor) -> None:
        """Have room for as many tokens as needed, and as many again, up to the context."""
        self._capacity = min(self._context, 2 * self._stop)
        rows, heads, _, head = like.shape
        # Zeros, because a mask hides no NaN.
        store = like.new_zeros(self._layers, 2, rows, heads, self._capacity, head)
        for pair, before in zip(store, self._keys_values, strict=False):
            for new, old in zip(pair, before, strict=True):
                new[:, :, : old.shape[2]] = old
        self._keys_values = [(keys, values) for keys, values in store]

    @classmethod
    def joined(cls, caches: Sequence[Cache], rows: torch.Tensor) -> Cache:
        """Return the cache whose row i is row ``rows[i]`` of ``caches``, whose rows are numbered in turn."""
        first = caches[0]
        lengths = [length for cache in caches for length in cache.lengths]
        joined = cls(
            first._layers, first._context, first._window, [lengths[row] for row in rows.tolist()], first._device
        )
        joined._capacity = max(cache._capacity for cache in caches)

        def join(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
            padded = [F.pad(tensor, (0, 0, 0, joined._capacity - tensor.shape[2])) for tensor in tensors]
            return (padded[0] if len(padded) == 1 else torch.cat(padded)).index_select(0, rows)

        layers = zip(*(cache._keys_values for cache in caches), strict=True)
        joined._keys_values = [(join([k for k, _ in layer]), join([v for _, v in layer])) for layer in layers]
        return joined


class GPT:
    """A decoder-only Transformer over parameters by name.

    Attributes:
        head: of the last stage: the table ``[vocab, embed]`` of ``scores``, and its bias: None.
        masks: draws this rank's dropout masks.
        layers: has the parameters of every layer there while it computes.
        context: the ranks that have other positions of the rows that ``hidden`` gets; None: there are none.
    """

    masks: DropoutMasks
    context: ContextRanks | None = None
    own_masks = True
    layers = WholeLayers()

    def __init__(self, settings: GPTSettings, model_shard: ModelShard, collectives: Collectives) -> None:
        self.s = settings
        self._model_shard = model_shard
        self._collectives = collectives
        self._head_collectives = collectives  # those of the newest hidden states, whose positions may be sharded
        # Fewer key-value heads than ranks: all ranks hold all, and each uses the one that its query heads need.
        self._kv_replicated = settings.kv_heads % model_shard.tensor > 0
        self._kv_heads = 1 if self._kv_replicated else settings.kv_heads // model_shard.tensor
        tables = rotary_tables(settings) if settings.positions == "rotary" else ()
        self._rotary_tables = tuple(map(torch.from_numpy, tables))  # cosines and sines [context, rotary_width]
        # Of context ranks, by how many positions they have: these, and the tables at these.
        self._own_positions: dict[int, torch.Tensor] = {}
        self._own_rotary_tables: dict[int, tuple[torch.Tensor, ...]] = {}

    def bind(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Use these tensors as parameters; they are looked up by layer once, here."""
        self._p = dict(parameters)
        prefixes = [f"layers.{i}." for i in self._model_shard.layers]
        self._layers = [{n[len(p) :]: t for n, t in self._p.items() if n.startswith(p)} for p in prefixes]
        table: Any = self._p.get("embed.tokens" if self.s.tie_embeddings else "head.weight")
        self.head = table, None
        # Here, not at their first use: that would change what torch.compile has seen, and it would compile again.
        device = next(iter(self._p.values())).device
        self._rotary_tables = tuple(t.to(device) for t in self._rotary_tables)
        # Replicated parameters of which each rank computes only a part of the gradient, without and with sequence
        # parallelism: their gradients have to be summed. Norms of queries and keys are those of a rank's own heads.
        of_heads = [name for name in self._layers[0] if self._kv_replicated and name.startswith(_KV)]
        of_heads += [name for name in _QK_NORMS if self._model_shard.tensor > 1 and name in self._layers[0]]
        self._replicated = {False: of_heads, True: of_heads + [name for name in _BETWEEN if name in self._layers[0]]}

    def hidden(
        self,
        tokens: torch.Tensor,
        x: torch.Tensor | None,
        carry: None,
        training: bool,
        checkpointing: bool,
        starts: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, None]:
        """Return this stage's activations ``[rows, time, embed]`` of ``tokens`` ``[rows, time]``, and ``carry``.

        ``x``: those of the stage before, in the first stage None; with sequence parallelism, of this rank's positions.
        ``starts``: of rows that are divided into documents: ``Batch.document_starts``.
        """
        c = self._collectives.over(tokens.shape[1])
        x = self._embed(tokens, self._start(tokens.shape[1]), training, c, starts) if x is None else x
        recomputes = checkpointing and training
        masks = () if recomputes else self._document_masks(x, starts)
        self.layers.share((*self._own_rotary_tables.get(tokens.shape[1], self._rotary_tables), *masks))
        for number, layer in zip(self._model_shard.layers, self._layers, strict=True):
            x = self.layers.enter(x, f"layers.{number}")
            if recomputes:
                x = self.masks.recomputed(self._recomputed_layer, x, number, layer, training, c, starts)
            else:
                x = self._layer(x, number, layer, training, None, c, masks)
            x = self.layers.leave(x, f"layers.{number}")
        return self._finish(x, c), carry

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits ``[..., vocab]`` of hidden states ``[..., embed]``: this rank's range of the vocabulary."""
        return self._head_collectives.scores(hidden, *self.head)

    def initial_carry(self, rows: int, device: torch.device) -> None:
        """Return the state at the start of a text: a Transformer carries none."""

    def cache(self, rows: int, device: torch.device) -> Cache:
        """Return an empty key-value cache."""
        return Cache(len(self._layers), self.s.context, self.s.local_window, [0] * rows, device)

    def check_length(self, cache: Cache, added: int) -> None:
        """Refuse more tokens than the context holds."""
        total = max(cache.lengths) + added
        if total > self.s.context:
            raise HvdlmError(f"{total} tokens are more than the model's context of {self.s.context}.")

    def extend(self, tokens: torch.Tensor, x: torch.Tensor | None, cache: Cache) -> tuple[torch.Tensor, Cache]:
        """Return this stage's activations of tokens that follow those in the cache; see ``hidden``."""
        c, time = self._collectives.alone(), tokens.shape[1]
        cache.begin(time)
        x = self._embed(tokens, cache.start, False, c) if x is None else x
        for number, layer in zip(self._model_shard.layers, self._layers, strict=True):
            x = self.layers.enter(x, f"layers.{number}")
            x = self.layers.leave(self._layer(x, number, layer, False, cache, c), f"layers.{number}")
        cache.end(time)
        return self._finish(x, c), cache

    def join(self, caches: Sequence[Cache], rows: torch.Tensor) -> Cache:
        """Return the cache whose row i is row ``rows[i]`` of ``caches``, whose rows are numbered in turn."""
        return Cache.joined(caches, rows)

    def carry_arrays(self, carry: None) -> dict[str, Any]:
        """Return the carried state as arrays, for checkpoints: there is none."""
        return {}

    def carry_tensors(self, arrays: Mapping[str, Any], micro_rows: int | None, device: torch.device) -> dict[int, Any]:
        """Return the carried state of every micro-batch, from a checkpoint: there is none."""
        return {}

    def _embed(
        self,
        tokens: torch.Tensor,
        start: int | torch.Tensor,
        training: bool,
        c: Collectives,
        starts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.layers.enter(None, "embed")
        x = c.leave(c.embedding(tokens, self._p["embed.tokens"]), "embed")
        x = x * self.s.width**0.5 if self.s.scale_embeddings else x
        if self.s.positions == "learned":
            p = c.shared(self._p, ["embed.positions"] if c.sequence else [], "positions")
            if starts is None:
                x = x + _rows(p["embed.positions"], start, tokens.shape[1])[..., _own(c, x.shape[1]), :]
            else:
                first = c.index * x.shape[1] if c.sequence else 0
                own = torch.arange(first, first + x.shape[1], device=x.device)
                x = x + F.embedding(own - starts[:, first : first + x.shape[1]], p["embed.positions"])
        return self._dropout(self.layers.leave(x, "embed"), training)

    def _start(self, time: int) -> int | torch.Tensor:
        """Return the position of the first of ``time`` tokens; of context ranks those of all, int64 ``[1, time]``."""
        if self.context is None:
            return 0
        if time not in self._own_positions:
            device = next(iter(self._p.values())).device
            self._own_positions[time] = own = torch.from_numpy(self.context.positions(time)[None]).to(device)
            self._own_rotary_tables[time] = tuple(_rows(t, own, time) for t in self._rotary_tables)
        return self._own_positions[time]

    def _finish(self, x: torch.Tensor, c: Collectives) -> torch.Tensor:
        """Return ``x`` through the last norm, in the last stage."""
        if not self._model_shard.stage.last:
            return x
        x = self.layers.enter(x, "head")
        names = [n for n in self._p if n.startswith("final_norm.")] if c.sequence else []
        self._head_collectives = c
        return self._norm(x, c.shared(self._p, names, "final"), "final_norm")

    def _document_masks(self, x: torch.Tensor, starts: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Return the masks of all layers of rows that are divided into documents."""
        if starts is None:
            return ()
        half = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if half else torch.float32  # that of queries
        return document_masks(starts, self.s.local_window, dtype)

    def _recomputed_layer(
        self, x: torch.Tensor, number: int, p: Layer, training: bool, c: Collectives, starts: torch.Tensor | None
    ) -> torch.Tensor:
        """Return a layer's output; masks are made anew, too: they may be larger than all that a layer keeps."""
        return self._layer(x, number, p, training, None, c, self._document_masks(x, starts))

    def _layer(
        self,
        x: torch.Tensor,
        number: int,
        p: Layer,
        training: bool,
        cache: Cache | None,
        c: Collectives,
        masks: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        p = c.shared(p, self._replicated[c.sequence], str(number))
        a = self._attention(self._norm(x, p, "attention_norm"), number, p, cache, c, masks)
        before, x = x, x + self._dropout(_row_parallel(a, p, "attention.output", c, f"{number}.attention"), training)
        m = self._mlp(self._norm(before if self.s.parallel_residual else x, p, "mlp_norm"), number, p, c)
        m = _row_parallel(m, p, "mlp.down", c, f"{number}.mlp")
        return x + self._dropout(m, training)

    def _attention(
        self,
        h: torch.Tensor,
        number: int,
        p: Layer,
        cache: Cache | None,
        c: Collectives,
        masks: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """Return the output of this rank's heads, ``[rows, time, heads * head / ranks]``."""
        p = self._one_kv_head(p) if self._kv_replicated else p
        names = ("attention.query", "attention.key", "attention.value")
        q, k, v = _column_parallel(h, p, names, c, f"{number}.attention")
        rows, time, _ = q.shape
        q, k, v = (t.view(rows, time, -1, self.s.head_width) for t in (q, k, v))
        if self.s.qk_norm:
            q, k = self._norm_heads(q, p, "attention.query_norm"), self._norm_heads(k, p, "attention.key_norm")
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        start = cache.start if cache else self._start(time)
        if self.s.positions == "rotary":
            q, k = self._rotate(q, start), self._rotate(k, start)
        if cache:
            k, v = cache.extend(number - self._model_shard.layers[0], k, v)
        if cache is None and self.context is not None:
            return attend_over_ranks(q, k, v, self.context, f"context.{number}")
        if cache is None or cache.causal:
            return attend_causally(q, k, v, self.s.local_window, masks)
        return attend(q, k, v, cache.mask)

    def _one_kv_head(self, p: Layer) -> Layer:
        """Return ``p`` with the columns of the one key-value head that this rank's query heads use."""
        first = self._model_shard.index * self.s.kv_heads // self._model_shard.tensor * self.s.head_width
        columns = slice(first, first + self.s.head_width)
        return {n: t[..., columns] if n.startswith(_KV) else t for n, t in p.items()}

    def _rotate(self, x: torch.Tensor, start: int | torch.Tensor) -> torch.Tensor:
        time = x.shape[2]  # the tables are [time, rotary_width], or of rows
        if isinstance(start, int) or start.dim() == 1:
            cos, sin = (_rows(t, start, time) for t in self._rotary_tables)
        else:  # one for all layers, which keep it for their backward passes
            cos, sin = self._own_rotary_tables[time]
        width = self.s.rotary_width
        if width == self.s.head_width:
            return _rotated(x, cos.unsqueeze(-3), sin.unsqueeze(-3))
        # Joined as [rows, time, heads, head], as it lies in memory: attention's output follows the queries' layout, and
        # would be copied in another one.
        x = x.transpose(1, 2)
        rotated = _rotated(x[..., :width], cos.unsqueeze(-2), sin.unsqueeze(-2))
        return torch.cat((rotated, x[..., width:]), dim=-1).transpose(1, 2)

    def _mlp(self, h: torch.Tensor, number: int, p: Layer, c: Collectives) -> torch.Tensor:
        """Return this rank's columns of the inner layer, ``[rows, time, mlp / ranks]``."""
        if self.s.gated:
            gate, up = _column_parallel(h, p, ("mlp.gate", "mlp.up"), c, f"{number}.mlp")
            return (F.silu(gate) if self.s.activation == "swiglu" else F.gelu(gate, approximate="tanh")) * up
        (up,) = _column_parallel(h, p, ("mlp.up",), c, f"{number}.mlp")
        return F.gelu(up, approximate="tanh" if self.s.activation == "gelu" else "none")

    def _norm(self, x: torch.Tensor, p: Layer, name: str) -> torch.Tensor:
        scale, width = p[f"{name}.scale"], (self.s.width,)
        if self.s.norm == "rmsnorm":
            return F.rms_norm(x, width, scale, self.s.norm_epsilon)
        return F.layer_norm(x, width, scale, p.get(f"{name}.bias"), self.s.norm_epsilon)

    def _norm_heads(self, x: torch.Tensor, p: Layer, name: str) -> torch.Tensor:
        """Return ``x`` ``[..., head]``, normalised over the dimensions of a head, in its own dtype."""
        wide = F.rms_norm(x.float(), (self.s.head_width,), p[f"{name}.scale"], self.s.norm_epsilon)
        return wide.to(x.dtype)

    def _dropout(self, x: torch.Tensor, training: bool) -> torch.Tensor:
        return self.masks.drop(x, self.s.dropout) if training and self.s.dropout else x


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos + rotated * sin).to(x.dtype)


def _rows(table: torch.Tensor, start: int | torch.Tensor, time: int) -> torch.Tensor:
    """Return rows ``start`` to ``start + time`` of ``table``; of starts ``[rows]``, ``[rows, time, width]``.

    ``start`` ``[1, time]`` are the numbers of the rows themselves.
    """
    if isinstance(start, int):
        return table[start : start + time]
    if start.dim() > 1:
        return table[start[0]]
    return table[start[:, None] + torch.arange(time, device=start.device)]


def _own(c: Collectives, time: int) -> slice:
    """Return which positions a rank has between products, ``time`` of them."""
    return slice(c.index * time, (c.index + 1) * time) if c.sequence else slice(None)


def _column_parallel(
    x: torch.Tensor, p: Layer, names: Sequence[str], c: Collectives, label: str
) -> Sequence[torch.Tensor]:
    """Return the products of ``x`` ``[rows, time, embed]`` and a rank's columns of several weights, plus biases."""
    biases = [p[f"{name}.bias"] for name in names if f"{name}.bias" in p]
    return c.columns(x, [p[f"{name}.weight"] for name in names], biases, label)


def _row_parallel(x: torch.Tensor, p: Layer, name: str, c: Collectives, label: str) -> torch.Tensor:
    """Return the sum over ranks of ``x`` ``[rows, time, inputs / ranks]`` times a rank's rows of a weight."""
    weight, bias = p[f"{name}.weight"], p.get(f"{name}.bias")
    if c.size == 1:
        return linear(x, weight, bias)
    product = c.leave(linear(x, weight), label)  # the bias is added after the sum, which would count it once per rank
    return product if bias is None else product + bias
