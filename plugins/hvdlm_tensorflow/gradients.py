"""Storage of gradients, and their sums over micro-batches and ranks.

The layout cuts the flat gradient into buckets, in the order in which the backward pass finishes them. A graph starts a
bucket's collective as soon as its gradients are computed: the edges of the graph are the hooks that PyTorch needs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from hvdlm.parallel.sharded_state import ShardedState
from hvdlm.planning.gathered_layers import held_at_peak
from hvdlm.protocols.group import Done, Handle
from hvdlm_language.axis_groups import Axes
from hvdlm_language.leaf_tree import LeafTree
from hvdlm_tensorflow.slices import take


class Sums(NamedTuple):
    """The gradients and metrics of a step, summed over the ranks.

    Attributes:
        totals: float64 ``[3]``: the loss sum, the valid tokens and the gradient's squared norm of the global batch.
        gradient_seconds: the time waited for gradients.
        stage_seconds: the time waited for other pipeline stages.
        shard: the gradients that this rank applies: ``[size / ranks]`` with ZeRO, else all, ``[size]``.
    """

    totals: tf.Tensor
    gradient_seconds: tf.Tensor
    stage_seconds: tf.Tensor
    shard: tf.Tensor


class Gradients(ABC):
    """The gradients of one step."""

    def __init__(self, state: ShardedState, axes: Axes) -> None:
        self._state = state
        self._axes = axes
        self._layout = state.layout
        self._exchange = state.exchange
        self._ranges = [self._layout.bucket_range(index) for index in range(len(self._layout.buckets))]

    @abstractmethod
    def begin(self) -> None:
        """Clear the gradients of the step before."""

    def before_backward(self, last: bool) -> None:  # noqa: B027
        """Prepare for the graph of a micro-batch, perhaps the step's ``last``."""

    @abstractmethod
    def add(self, gradient: tf.Tensor) -> None:
        """Add a micro-batch's gradient ``[size]``, in a graph."""

    @abstractmethod
    def buckets(self, last: list[tf.Tensor] | None) -> list[tf.Tensor]:
        """Return what is left to be summed over data ranks; ``last``: the last micro-batch's buckets, if not added."""

    @abstractmethod
    def bytes(self) -> int:
        """Return the bytes held for gradients."""

    def row(self, number: int) -> int | None:
        """Return the row of the global batch by which micro-batch ``number`` seeds dropout; None: the rank's seed."""
        return None

    def pack(self, gradients: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Return flat buckets of flat gradients in the layout's order, padded by zeros where the layout says so."""
        buckets = []
        for index, (first, last) in enumerate(self._layout.buckets):
            padding = self._ranges[index][1] - self._layout.slots[last - 1].stop
            buckets.append(tf.concat([*gradients[first:last], *([tf.zeros(padding)] if padding else [])], 0))
        return buckets

    def reduce(self, buckets: list[tf.Tensor], loss_sum: tf.Tensor, tokens: tf.Tensor) -> Sums:
        """Sum ``buckets`` and metrics (float64) over the ranks, in a graph."""
        exchange = self._exchange
        # Traced first: TensorFlow runs stateful operations (timestamps, collectives of some transports) in the order of
        # the trace, and what follows here waits for all buckets.
        handles = self._start(buckets)
        with tf.control_dependencies(buckets):
            # Not right after the forward pass: Horovod's thread would take a core from the backward pass.
            totals = self._metrics(loss_sum, tokens)
            ready = tf.timestamp()
        metrics = exchange.start_metrics(totals) if exchange.traits.zero_size == 1 else None
        shards = self._shards([handle.wait() for handle in handles])
        with tf.control_dependencies(shards):
            reduced = tf.timestamp()
            gradient_seconds = tf.maximum(reduced - ready, 0.0) if exchange.traits.size > 1 else ready * 0.0
        self._add_tied(shards)
        shard = tf.concat(shards, 0)
        squared = self._squared_norm(shard)
        if metrics is None:  # ZeRO: a rank has the norm of its shard only, which is summed with the metrics
            totals = exchange.start_metrics(tf.concat([totals, squared], 0)).wait()
        else:
            totals = tf.concat([metrics.wait(), squared], 0)
        totals = self._sum_over_model(totals)
        with tf.control_dependencies([totals]):
            stage_seconds = tf.maximum(tf.timestamp() - reduced, 0.0)
        return Sums(totals, gradient_seconds, stage_seconds, shard)

    def _start(self, buckets: list[tf.Tensor]) -> Sequence[Handle]:
        """Start the sums of all buckets."""
        return [self._exchange.start(bucket, index) for index, bucket in enumerate(buckets)]

    def _metrics(self, loss_sum: tf.Tensor, tokens: tf.Tensor) -> tf.Tensor:
        """Return what is summed over the ranks, the loss sum and the tokens: float64 ``[2]``."""
        return tf.stack([loss_sum, tokens])

    @abstractmethod
    def _shards(self, sums: list[tf.Tensor]) -> list[tf.Tensor]:
        """Return this rank's shard of every bucket of the step, from the sums of what ``buckets`` returned."""

    def _add_tied(self, shards: list[tf.Tensor]) -> None:
        """Add up the gradients of the parameters that the first and the last pipeline stage both hold."""
        ends = self._axes.ends
        if ends is None:
            return
        for index in self._state.tied_buckets:
            shards[index] = ends.all_reduce_async(shards[index], "tied").wait()

    def _squared_norm(self, shard: tf.Tensor) -> tf.Tensor:
        """Return the sum of the shard's squares, float64 ``[1]``.

        A gradient that several tensor ranks or stages hold counts on one of them, so that the ranks' sums add up.
        """
        # tf.norm writes the squares to memory before it adds them up, which takes 2.6 times as long.
        halves = [tf.cast(tf.nn.l2_loss(shard[start:stop]), tf.float64) for start, stop in self._state.norm_ranges]
        return 2.0 * tf.reduce_sum(tf.stack(halves), keepdims=True) if halves else tf.zeros(1, tf.float64)

    def _sum_over_model(self, totals: tf.Tensor) -> tf.Tensor:
        """Return (loss sum, tokens, squared norm) of the whole model from this rank's, float64 ``[3]``."""
        if len(self._axes.model.ranks) == 1:
            return totals
        model_shard = self._state.model_shard
        if not (model_shard.stage.last and model_shard.index == 0):
            totals *= tf.constant([0.0, 0.0, 1.0], tf.float64)  # all tensor ranks know the losses: one of them counts
        return self._axes.model.all_reduce_async(totals, "norm").wait()

    def _cut(self, flat: tf.Tensor) -> list[tf.Tensor]:
        """Return the buckets of a flat gradient ``[size]``."""
        return [flat[start:stop] for start, stop in self._ranges]


class WholeGradients(Gradients):
    """All gradients, in one flat variable where several micro-batches add up, else in the graph only."""

    def __init__(self, state: ShardedState, axes: Axes) -> None:
        super().__init__(state, axes)
        # A stage's passes are another graph than the update.
        several = state.config.train.micro_batch_size is not None or state.model_shard.stage.count > 1
        self._flat = tf.Variable(tf.zeros(self._layout.size), trainable=False) if several else None

    def begin(self) -> None:
        """Set all gradients to zero: micro-batches add to them."""
        if self._flat is not None:
            self._flat.assign(tf.zeros_like(self._flat))

    def add(self, gradient: tf.Tensor) -> None:
        """Add a micro-batch's gradient ``[size]``."""
        assert self._flat is not None
        self._flat.assign_add(gradient)

    def buckets(self, last: list[tf.Tensor] | None) -> list[tf.Tensor]:
        """Return the buckets of all micro-batches' sum."""
        if last is None:
            return self._cut(tf.identity(self._flat))
        if self._flat is None:
            return last
        return [bucket + before for bucket, before in zip(last, self._cut(self._flat), strict=True)]

    def _shards(self, sums: list[tf.Tensor]) -> list[tf.Tensor]:
        """Return ``sums``."""
        return sums

    def bytes(self) -> int:
        """Return the bytes held for gradients."""
        ranks = self._exchange.traits.zero_size
        return 4 * (self._layout.size + (self._layout.size // ranks if ranks > 1 else 0))


class TreeGradients(WholeGradients):
    """The gradients of micro-batches that are leaves, added in the order of a ``LeafTree`` (exact sums).

    The flat variable holds the newest sum of the tree's stack, to which a graph adds the next leaf where the two are
    joined. Otherwise it is copied to the sums that wait, and the next leaf starts from zero.
    """

    def __init__(self, state: ShardedState, axes: Axes) -> None:
        super().__init__(state, axes)
        self._tree = LeafTree.of(state.config, state.mesh.data, state.coordinates["data"])
        self._rows = state.config.train.batch_size // self._tree.leaves
        zeros = tf.zeros(self._layout.size)
        self._stack = [tf.Variable(zeros, trainable=False) for _ in range(self._tree.depth)]
        self._waiting = 0  # sums in the stack
        self._leaf = -1  # the one that was computed last
        exchange: Any = state.exchange
        exchange.add = _ordered_sum

    def begin(self) -> None:
        """Empty the stack."""
        super().begin()
        self._waiting, self._leaf = 0, -1

    def before_backward(self, last: bool) -> None:
        """Join the leaf before with the sums that wait for it, and make room where the next one isn't added to it."""
        assert self._flat is not None
        if self._leaf >= 0:
            for _ in range(self._tree.joins[self._leaf] - 1):  # the leaf's graph has done the first
                self._waiting -= 1
                self._flat.assign_add(self._stack[self._waiting])
        self._leaf += 1
        if self._leaf and not self._tree.joins[self._leaf]:
            self._stack[self._waiting].assign(self._flat)
            self._waiting += 1
            self._flat.assign(tf.zeros_like(self._flat))

    def buckets(self, last: list[tf.Tensor] | None) -> list[tf.Tensor]:
        """Return the roots of this rank's leaves for every bucket, as the exchange takes them."""
        sums = [tf.identity(variable) for variable in (*self._stack[: self._waiting], self._flat)]
        buckets = []
        for start, stop in self._ranges:
            *waiting, newest = (total[start:stop] for total in sums)
            for _ in range(self._tree.joins[self._leaf] - 1):
                newest = _ordered_sum(newest, waiting.pop())
            buckets.append(self._packed([*waiting, newest]))
        return buckets

    def _packed(self, roots: list[tf.Tensor]) -> tf.Tensor:
        """Return this rank's roots ``[elements]`` as ``[ranks, roots, elements / ranks]``, flat and padded by zeros."""
        ranks, missing = self._exchange.traits.size, self._tree.roots - len(roots)
        padding = -roots[0].shape[0] % ranks
        if self._tree.roots == 1 and not padding:
            return roots[0]
        rows = tf.pad(tf.stack(roots), [[0, missing], [0, padding]])
        return tf.reshape(tf.transpose(tf.reshape(rows, [self._tree.roots, ranks, -1]), [1, 0, 2]), [-1])

    def _metrics(self, loss_sum: tf.Tensor, tokens: tf.Tensor) -> tf.Tensor:
        """Return every leaf's loss sum, and all tokens in the first row: float64 ``[leaves, 2]``."""
        return tf.stack([loss_sum, tf.pad([tokens], [[0, self._tree.count - 1]])], 1)

    def row(self, number: int) -> int:
        """Return the first row of a leaf, which is the same on any number of ranks."""
        return (self._tree.first + number) * self._rows

    def _shards(self, sums: list[tf.Tensor]) -> list[tf.Tensor]:
        """Return ``sums`` without their padding."""
        lengths = [stop - start for start, stop in self._ranges]
        return [tf.reshape(total[:length], [length]) for total, length in zip(sums, lengths, strict=True)]

    def bytes(self) -> int:
        """Return the bytes held for gradients, with the sums that wait."""
        return super().bytes() + 4 * self._layout.size * len(self._stack)


class ScatteredGradients(Gradients):
    """Of all gradients this rank's shard only (ZeRO-2): every micro-batch's buckets are reduce-scattered."""

    def __init__(self, state: ShardedState, axes: Axes) -> None:
        super().__init__(state, axes)
        self._size = self._layout.size // self._exchange.traits.zero_size
        self._shard = self._make_shard()

    def _make_shard(self) -> tf.Variable:
        return tf.Variable(tf.zeros(self._size), trainable=False)

    def begin(self) -> None:
        """Set the shard to zero: micro-batches add to it."""
        self._shard.assign(tf.zeros_like(self._shard))

    def add(self, gradient: tf.Tensor) -> None:
        """Scatter a micro-batch's gradient ``[size]``, and add this rank's shard of the sum."""
        handles = [self._exchange.start(bucket, index) for index, bucket in enumerate(self._cut(gradient))]
        self._shard.assign_add(tf.concat([handle.wait() for handle in handles], 0))

    def buckets(self, last: list[tf.Tensor] | None) -> list[tf.Tensor]:
        """Return the last micro-batch's buckets; the others have been scattered."""
        return last or []

    def _shards(self, sums: list[tf.Tensor]) -> list[tf.Tensor]:
        """Return the shards of all micro-batches' sum."""
        before = [self._shard[start:stop] for start, stop in self._state.shard_ranges]
        return [total + earlier for total, earlier in zip(sums, before, strict=True)] if sums else before

    def bytes(self) -> int:
        """Return the bytes held for gradients: of buckets under way, the most that two neighbours have."""
        following = zip(self._ranges, [*self._ranges[1:], self._ranges[-1]], strict=True)
        most_in_flight = max(stop - start for (start, _), (_, stop) in following)
        return 4 * (most_in_flight + self._size)


class LayerGradients(ScatteredGradients):
    """This rank's shard of gradients that ``GatheredLayers`` scatters in the backward pass (ZeRO-3).

    A graph takes the variable's memory, adds to it, and returns it. The last one of a step keeps it for the update, so
    that between steps the variable is empty.
    """

    def _make_shard(self) -> tf.Variable:
        return tf.Variable(tf.zeros([0]), trainable=False, shape=[None])

    def begin(self) -> None:
        """Let the variable hold zeros: micro-batches add to them."""
        self._shard.assign(tf.zeros(self._size))

    def take(self) -> tf.Tensor:
        """Return the sum of earlier micro-batches ``[size / ranks]``, in a graph, which alone has its memory."""
        return tf.ensure_shape(take(self._shard.handle), [self._size])

    def add(self, gradient: tf.Tensor) -> None:
        """Give back what ``take`` returned, with a micro-batch's gradients."""
        self._shard.assign(gradient)

    def pack(self, gradients: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Return the shard of all buckets as it is."""
        return list(gradients)

    def _start(self, buckets: list[tf.Tensor]) -> Sequence[Handle]:
        return [Done(bucket) for bucket in buckets]

    def _shards(self, sums: list[tf.Tensor]) -> list[tf.Tensor]:
        """Return ``sums``, which the gradients of earlier micro-batches are part of."""
        return sums

    def bytes(self) -> int:
        """Return the bytes held for gradients, of those under way as the edges of the graph bound them."""
        state, ranks = self._state, self._exchange.traits.zero_size
        held = held_at_peak(self._layout, ranks, state.spec.settings.tie_embeddings, in_graph=True)
        return 4 * self._size + held["gradients"]


def make_gradients(state: ShardedState, axes: Axes) -> Gradients:
    """Return the gradients in the form that the exchange asks for."""
    if state.config.communication.reduction == "exact":
        return TreeGradients(state, axes)
    if state.exchange.traits.shards_parameters:
        return LayerGradients(state, axes)
    kind = ScatteredGradients if state.exchange.traits.scatters_every else WholeGradients
    return kind(state, axes)


def _ordered_sum(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """Return ``a + b``, which stays a sum of these two: of nested sums, TensorFlow makes one of another order."""
    return tf.raw_ops.Snapshot(input=a + b)
