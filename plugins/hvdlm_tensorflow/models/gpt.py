"""GPT in TensorFlow: the equations of ``hvdlm_language.gpt``, in the same order.

A rank computes the layers of its pipeline stage, and of each layer its tensor rank's heads and columns of the MLP. Its
parameters are cut already; only the collectives between the products show it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from hvdlm.errors import HvdlmError
from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm_language.context_ranks import ContextRanks
from hvdlm_language.gpt import GPTSettings, rotary_tables
from hvdlm_tensorflow.attention import attend, attend_causally, causal_mask
from hvdlm_tensorflow.collectives import Collectives, linear
from hvdlm_tensorflow.context_attention import attend_over_ranks
from hvdlm_tensorflow.gathered_layers import WholeLayers
from hvdlm_tensorflow.shapes import sizes

Layer = Mapping[str, tf.Tensor]
Dropout = Callable[[tf.Tensor, int], tf.Tensor]
ExtendCache = Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]
# Parameters of a layer that are used between the products, where sequence parallelism cuts the positions.
_BETWEEN: tuple[str, ...] = ("attention_norm.scale", "attention_norm.bias", "attention.output.bias")
_BETWEEN += ("mlp_norm.scale", "mlp_norm.bias", "mlp.down.bias")
_KV = ("attention.key.", "attention.value.")
_QK_NORMS = ("attention.query_norm.scale", "attention.key_norm.scale")


class Cache(NamedTuple):
    """Keys and values of a rank's layers, ``[layers, 2, rows, kv_heads, context, head]``.

    ``lengths``: the number of tokens in every row, int32 ``[rows]``.
    """

    store: tf.Tensor
    lengths: tf.Tensor

    def extend(self, layer: int, new: tf.Tensor) -> tf.Tensor:
        """Return the keys and values of a layer with ``new`` ones, ``[2, rows, kv_heads, time, head]``, in place."""
        store = self.store[layer]
        time = sizes(new)[3]
        offsets = tf.range(store.shape[3]) - self.lengths[:, None]  # [rows, context]: 0 where the first one belongs
        if new.shape[3] != 1:
            by_row = tf.transpose(new, [1, 3, 0, 2, 4])
            by_row = tf.gather(by_row, tf.clip_by_value(offsets, 0, time - 1), batch_dims=1)
            new = tf.transpose(by_row, [2, 0, 3, 1, 4])  # [2, rows, kv_heads, context, head]
        return tf.where(((offsets >= 0) & (offsets < time))[:, None, :, None], new, store)


class GPT:
    """A decoder-only Transformer over parameters by name.

    Attributes:
        head: of the last stage: the table ``[vocab, embed]`` of ``scores``, and its bias: None.
        layers: has the parameters of every layer there while it computes.
        orders_layers: whether a backward pass computes a layer's gradients before those of the layer below.
        context: the ranks that have other positions of the rows that ``hidden`` gets; None: there are none.
    """

    context: ContextRanks | None = None

    def __init__(self, settings: GPTSettings, model_shard: ModelShard, collectives: Collectives) -> None:
        self.s = settings
        self.dtype = tf.float32
        self.orders_layers = True
        self.layers = WholeLayers()
        self._model_shard = model_shard
        self._collectives = collectives
        self._head_collectives = collectives  # those of the newest hidden states, whose positions may be sharded
        # Fewer key-value heads than ranks: all ranks hold all, and each uses the one that its query heads need.
        self._kv_replicated = settings.kv_heads % model_shard.tensor > 0
        self._kv_heads = 1 if self._kv_replicated else settings.kv_heads // model_shard.tensor
        self._rotary_tables = rotary_tables(settings) if settings.positions == "rotary" else ()

    def bind(self, parameters: Mapping[str, tf.Tensor]) -> None:
        """Use these tensors as parameters; norms compute in float32 in any precision."""
        self._p = {n: t if t is None or "norm" in n else tf.cast(t, self.dtype) for n, t in parameters.items()}
        prefixes = [f"layers.{i}." for i in self._model_shard.layers]
        self._layers = [{n[len(p) :]: t for n, t in self._p.items() if n.startswith(p)} for p in prefixes]
        self._table = "embed.tokens" if self.s.tie_embeddings else "head.weight"
        self.head: Any = self._p.get(self._table), None
        # Replicated parameters of which each rank computes only a part of the gradient, without and with sequence
        # parallelism: their gradients have to be summed. Norms of queries and keys are those of a rank's own heads.
        of_heads = [name for name in self._layers[0] if self._kv_replicated and name.startswith(_KV)]
        of_heads += [name for name in _QK_NORMS if self._model_shard.tensor > 1 and name in self._layers[0]]
        self._replicated = {False: of_heads, True: of_heads + [name for name in _BETWEEN if name in self._layers[0]]}

    def hidden(
        self,
        tokens: tf.Tensor,
        x: tf.Tensor | None,
        carry: Any,
        training: bool,
        checkpointing: bool,
        seed: tf.Tensor,
        starts: tf.Tensor | None = None,
    ) -> tuple[tf.Tensor, Any]:
        """Return this stage's activations ``[rows, time, embed]`` of ``tokens`` ``[rows, time]``, and ``carry``.

        ``x``: those of the stage before, in the first stage None; with sequence parallelism, of this rank's positions.
        ``starts``: of rows that are divided into documents: ``Batch.document_starts``.
        """
        rate = self.s.dropout if training else 0.0

        def dropout(x: tf.Tensor, number: int) -> tf.Tensor:
            if not rate:
                return x
            return tf.nn.experimental.stateless_dropout(x, rate, seed=seed + tf.constant([0, number]))

        time = tokens.shape[1]  # None: open in the graph
        c = self._collectives.over(time) if time else self._collectives.alone()
        start: Any = 0 if self.context is None else self.context.positions(time)[None]
        x = self._embed(tokens, start, dropout, c, starts) if x is None else x
        for number, layer in zip(self._model_shard.layers, self._layers, strict=True):

            def compute(x: tf.Tensor, p: Layer, i: int = number) -> tf.Tensor:
                return self._layer(x, p, i, dropout, c, start, divided=starts)

            ordered, again = training and self.orders_layers, checkpointing and training
            x = self.layers.run(f"layers.{number}", compute, x, layer, ordered, again)
        return self._finish(x, c), carry

    def scores(self, hidden: tf.Tensor) -> tf.Tensor:
        """Return logits ``[..., vocab]`` of hidden states ``[..., embed]``: this rank's range of the vocabulary."""
        return self._head_collectives.scores(hidden, *self.head)

    def initial_carry(self, rows: Any) -> tf.Tensor:
        """Return the state at the start of a text: there is none, and graphs take a tensor in its place."""
        return tf.zeros(())

    def cache(self, rows: int) -> Cache:
        """Return an empty key-value cache."""
        s = self.s
        shape = (len(self._model_shard.layers), 2, rows, self._kv_heads, s.context, s.head_width)
        return Cache(tf.zeros(shape, self.dtype), tf.zeros([rows], tf.int32))

    def check_length(self, cache: Cache, added: int) -> None:
        """Refuse more tokens than the context holds."""
        total = int(cache.lengths.numpy().max()) + added
        if total > self.s.context:
            raise HvdlmError(f"{total} tokens are more than the model's context of {self.s.context}.")

    def extend(self, tokens: tf.Tensor, x: tf.Tensor | None, cache: Cache) -> tuple[tf.Tensor, Cache]:
        """Return this stage's activations of tokens that follow those in the cache; see ``hidden``."""
        c = self._collectives.alone()
        start, time = cache.lengths, sizes(tokens)[1]
        x = self._embed(tokens, start, _no_dropout, c) if x is None else x
        stores = []
        for index, (number, layer) in enumerate(zip(self._model_shard.layers, self._layers, strict=True)):

            def extend(k: tf.Tensor, v: tf.Tensor, index: int = index) -> tuple[tf.Tensor, tf.Tensor]:
                stores.append(cache.extend(index, tf.stack([k, v])))
                return stores[-1][0], stores[-1][1]

            p = self.layers.gather(f"layers.{number}", x, layer)
            x = self._layer(x, p, number, _no_dropout, c, start, extend)
        return self._finish(x, c), Cache(tf.stack(stores), start + time)

    def join(self, caches: Sequence[Cache], rows: tf.Tensor) -> Cache:
        """Return the cache whose row i is row ``rows[i]`` of ``caches``, whose rows are numbered in turn."""
        stores, lengths = zip(*caches, strict=True)
        return Cache(tf.gather(tf.concat(stores, 2), rows, axis=2), tf.gather(tf.concat(lengths, 0), rows))

    def carry_arrays(self, carry: Any) -> dict[str, Any]:
        """Return the carried state as arrays, for checkpoints: there is none."""
        return {}

    def carry_tensors(self, arrays: Mapping[str, Any], micro_rows: int | None) -> dict[int, Any]:
        """Return the carried state of every micro-batch, from a checkpoint: there is none."""
        return {}

    def _embed(
        self, tokens: tf.Tensor, start: Any, dropout: Dropout, c: Collectives, starts: tf.Tensor | None = None
    ) -> tf.Tensor:
        self._p = {**self._p, **self.layers.gather("embed", tokens, {})}
        x = c.leave(c.embedding(tokens, self._p["embed.tokens"]), "embed")
        x = x * self.s.width**0.5 if self.s.scale_embeddings else x
        if self.s.positions == "learned":
            p = c.shared(self._p, ["embed.positions"] if c.sequence else [], "positions")
            if starts is None:
                x += _rows(p["embed.positions"], start, sizes(tokens)[1])[..., _own(c, x), :]
            else:
                time = sizes(x)[1]
                first = start + c.index * time if c.sequence else start
                own = first + tf.range(time) - starts[:, first : first + time]
                x += tf.gather(p["embed.positions"], own)
        return dropout(x, 0)

    def _finish(self, x: tf.Tensor, c: Collectives) -> tf.Tensor:
        """Return ``x`` through the last norm, in the last stage."""
        if not self._model_shard.stage.last:
            return x
        self._p = {**self._p, **self.layers.gather("head", x, {})}
        self.head = self._p.get(self._table), None
        names = [n for n in self._p if n.startswith("final_norm.")] if c.sequence else []
        self._head_collectives = c
        return self._norm(x, c.shared(self._p, names, "final"), "final_norm")

    def _layer(
        self,
        x: tf.Tensor,
        p: Layer,
        number: int,
        dropout: Dropout,
        c: Collectives,
        start: Any = 0,
        extend: ExtendCache | None = None,
        divided: tf.Tensor | None = None,
    ) -> tf.Tensor:
        p = c.shared(p, self._replicated[c.sequence], str(number))
        a = self._attention(self._norm(x, p, "attention_norm"), number, p, c, start, extend, divided)
        a = _row_parallel(a, p, "attention.output", c, f"{number}.attention")
        before, x = x, x + dropout(a, 2 * number + 1)
        m = self._mlp(self._norm(before if self.s.parallel_residual else x, p, "mlp_norm"), number, p, c)
        return x + dropout(_row_parallel(m, p, "mlp.down", c, f"{number}.mlp"), 2 * number + 2)

    def _attention(
        self,
        h: tf.Tensor,
        number: int,
        p: Layer,
        c: Collectives,
        start: Any,
        extend: ExtendCache | None,
        divided: tf.Tensor | None,
    ) -> tf.Tensor:
        """Return the output of this rank's heads, ``[rows, time, heads * head / ranks]``."""
        p = self._one_kv_head(p) if self._kv_replicated else p
        names = ("attention.query", "attention.key", "attention.value")
        products = _column_parallel(h, p, names, c, f"{number}.attention")
        rows, time, _ = sizes(products[0])
        q, k, v = (self._heads(product, rows, time) for product in products)
        if self.s.qk_norm:
            q, k = self._norm_heads(q, p, "attention.query_norm"), self._norm_heads(k, p, "attention.key_norm")
        if self.s.positions == "rotary":
            q, k = self._rotate(q, start, time), self._rotate(k, start, time)
        if extend is None and self.context is not None:
            return attend_over_ranks(q, k, v, self.context, f"context.{number}")
        if extend is None:
            return attend_causally(q, k, v, self.s.context, self.s.local_window, divided)
        mask = causal_mask(start[:, None, None, None], time, self.s.context, self.s.local_window)
        return attend(q, *extend(k, v), mask)

    def _one_kv_head(self, p: Layer) -> Layer:
        """Return ``p`` with the columns of the one key-value head that this rank's query heads use."""
        first = self._model_shard.index * self.s.kv_heads // self._model_shard.tensor * self.s.head_width
        columns = slice(first, first + self.s.head_width)
        return {n: t[..., columns] if n.startswith(_KV) else t for n, t in p.items()}

    def _heads(self, x: tf.Tensor, rows: Any, time: Any) -> tf.Tensor:
        heads = x.shape[-1] // self.s.head_width
        return tf.transpose(tf.reshape(x, [rows, time, heads, self.s.head_width]), [0, 2, 1, 3])

    def _rotate(self, x: tf.Tensor, start: Any, time: Any) -> tf.Tensor:
        # [1 or rows, 1, time, rotary_width]
        cos, sin = (_rows(tf.constant(t), start, time)[..., None, :, :] for t in self._rotary_tables)
        width = self.s.rotary_width
        if width < self.s.head_width:
            return tf.concat([_rotated(x[..., :width], cos, sin), x[..., width:]], -1)
        return _rotated(x, cos, sin)

    def _mlp(self, h: tf.Tensor, number: int, p: Layer, c: Collectives) -> tf.Tensor:
        """Return this rank's columns of the inner layer, ``[rows, time, mlp / ranks]``."""
        if self.s.gated:
            gate, up = _column_parallel(h, p, ("mlp.gate", "mlp.up"), c, f"{number}.mlp")
            return (tf.nn.silu(gate) if self.s.activation == "swiglu" else tf.nn.gelu(gate, approximate=True)) * up
        (up,) = _column_parallel(h, p, ("mlp.up",), c, f"{number}.mlp")
        return tf.nn.gelu(up, approximate=self.s.activation == "gelu")

    def _norm(self, x: tf.Tensor, p: Layer, name: str) -> tf.Tensor:
        wide = tf.cast(x, tf.float32)
        if self.s.norm == "layernorm":
            wide -= tf.reduce_mean(wide, -1, keepdims=True)
        wide = self._rms_norm(wide, p, name)
        bias = p.get(f"{name}.bias")
        return tf.cast(wide if bias is None else wide + bias, self.dtype)

    def _norm_heads(self, x: tf.Tensor, p: Layer, name: str) -> tf.Tensor:
        """Return ``x`` ``[..., head]``, normalised over the dimensions of a head, in its own dtype."""
        return tf.cast(self._rms_norm(tf.cast(x, tf.float32), p, name), x.dtype)

    def _rms_norm(self, x: tf.Tensor, p: Layer, name: str) -> tf.Tensor:
        variance = tf.reduce_mean(tf.square(x), -1, keepdims=True)
        return x * (tf.math.rsqrt(variance + self.s.norm_epsilon) * p[f"{name}.scale"])


def _no_dropout(x: tf.Tensor, number: int) -> tf.Tensor:
    return x


def _rotated(x: tf.Tensor, cos: tf.Tensor, sin: tf.Tensor) -> tf.Tensor:
    half = x.shape[-1] // 2
    rotated = tf.concat([-x[..., half:], x[..., :half]], -1)
    return tf.cast(tf.cast(x, tf.float32) * cos + tf.cast(rotated, tf.float32) * sin, x.dtype)


def _rows(table: tf.Tensor, start: Any, time: Any) -> tf.Tensor:
    """Return rows ``start`` to ``start + time`` of ``table``; of starts ``[rows]``, ``[rows, time, width]``.

    ``start`` ``[1, time]`` are the numbers of the rows themselves.
    """
    if len(getattr(start, "shape", ())) > 1:
        return tf.gather(table, start[0])
    if not getattr(start, "shape", ()):  # a number, or a scalar of the graph
        return table[start : start + time]
    return tf.gather(table, start[:, None] + tf.range(time))


def _own(c: Collectives, x: tf.Tensor) -> slice:
    """Return which positions a rank has between products: those of ``x`` ``[rows, time, embed]``."""
    return slice(c.index * x.shape[1], (c.index + 1) * x.shape[1]) if c.sequence else slice(None)


def _column_parallel(x: tf.Tensor, p: Layer, names: Sequence[str], c: Collectives, label: str) -> Sequence[tf.Tensor]:
    """Return the products of ``x`` ``[rows, time, embed]`` and a rank's columns of several weights, plus biases."""
    biases = [p[f"{name}.bias"] for name in names if f"{name}.bias" in p]
    return c.columns(x, [p[f"{name}.weight"] for name in names], biases, label)


def _row_parallel(x: tf.Tensor, p: Layer, name: str, c: Collectives, label: str) -> tf.Tensor:
    """Return the sum over ranks of ``x`` ``[rows, time, inputs / ranks]`` times a rank's rows of a weight."""
    # The bias is added after the sum, which would count it once per rank.
    product, bias = c.leave(linear(x, p[f"{name}.weight"]), label), p.get(f"{name}.bias")
    return product if bias is None else tf.nn.bias_add(product, bias)
