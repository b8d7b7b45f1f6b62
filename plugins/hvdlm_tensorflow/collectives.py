"""What tensor ranks say to each other within a layer: collectives through which gradients flow.

``enter`` and ``leave`` are f and g of Shoeybi et al. 2019, figure 3; under sequence parallelism they become g and
g-bar of Korthikanti et al. 2022, figure 5. With one tensor rank all are the identity.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import tensorflow as tf

from hvdlm.parallel.tensor_parallel import TensorRanks


class Collectives(TensorRanks):
    """What is said within a tensor group.

    A graph runs what doesn't depend on each other at once, so that no two may have the same name at the same time.
    """

    def enter(self, x: tf.Tensor, name: str) -> tf.Tensor:
        """Return ``x`` ``[rows, time, embed]`` for a product whose outputs the ranks share: their gradients add up."""
        if self.size == 1:
            return x
        return (self._gather_time if self.sequence else self._sum_gradient)(x, f"tensor.{name}")

    def leave(self, x: tf.Tensor, name: str) -> tf.Tensor:
        """Return the sum of ranks' ``x`` ``[rows, time, embed]``; of the positions, perhaps only this rank's."""
        if self.size == 1:
            return x
        return (self._scatter_time if self.sequence else self._sum_forward)(x, f"tensor.{name}")

    def join(self, x: tf.Tensor, name: str) -> tf.Tensor:
        """Return ranks' ``x`` ``[rows, hidden / ranks]`` side by side; each rank's gradient of it is a part of it."""
        name = f"tensor.{name}"

        @tf.custom_gradient
        def joined(x: tf.Tensor) -> Any:
            def backward(gradient: tf.Tensor) -> tf.Tensor:
                part = self.group.reduce_scatter_async(_wide(tf.transpose(gradient)), f"{name}.backward").wait()
                return tf.cast(tf.transpose(part), gradient.dtype)

            whole = self.group.all_gather_async(_wide(tf.transpose(x)), name).wait()
            return tf.cast(tf.transpose(whole), x.dtype), backward

        whole = joined(x)
        whole.set_shape([x.shape[0], x.shape[1] * self.size])
        return whole

    def shared(self, p: Mapping[str, tf.Tensor], names: Collection[str], name: str) -> Mapping[str, tf.Tensor]:
        """Return ``p``; of parameters ``names``, which all ranks hold, the gradients add up, in one all-reduce."""
        if not names:
            return p
        parts = [p[n] for n in names]

        @tf.custom_gradient
        def kept(*parts: tf.Tensor) -> Any:
            def backward(*gradients: tf.Tensor) -> list[tf.Tensor]:
                flat = tf.concat([_wide(tf.reshape(g, [-1])) for g in gradients], 0)
                total = self.group.all_reduce_async(flat, f"tensor.{name}.shared").wait()
                sums = tf.split(total, [part.shape.num_elements() for part in parts])
                return [tf.cast(tf.reshape(s, q.shape), q.dtype) for s, q in zip(sums, parts, strict=True)]

            return tuple(tf.identity(part) for part in parts), backward

        return {**p, **dict(zip(names, kept(*parts), strict=True))}

    def embedding(self, tokens: tf.Tensor, table: tf.Tensor) -> tf.Tensor:
        """Return rows of a table of which this rank has a range, zeros where a token is none of them."""
        if self.size == 1:
            return tf.gather(table, tokens)
        first, last = self.model_shard.range_of(self.model_shard.vocab)
        inside = (tokens >= first) & (tokens < last)
        found = tf.gather(table, tf.where(inside, tokens - first, 0))
        return found * tf.cast(inside, found.dtype)[..., None]

    def cross_entropy(self, scores: tf.Tensor, targets: tf.Tensor, smoothing: float = 0.0) -> tf.Tensor:
        """Return losses ``[rows, time]`` in nats from this rank's ``scores`` ``[rows, time, vocab / ranks]``.

        Of every target, ranks tell each other three figures: the largest score, the sum of exponentials, the target's
        score. ``smoothing``: the share of a target that is spread over the whole vocabulary; 0 with several ranks.
        """
        if self.size == 1:
            wanted = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=targets, logits=scores)
            if not smoothing:
                return wanted
            spread = tf.reduce_logsumexp(scores, -1) - tf.reduce_mean(scores, -1)
            return (1.0 - smoothing) * wanted + smoothing * spread
        first, last = self.model_shard.range_of(self.model_shard.vocab)
        flat, wanted = tf.reshape(scores, [-1, last - first]), tf.reshape(targets, [-1])
        here = (wanted >= first) & (wanted < last)
        hot = tf.one_hot(tf.where(here, wanted - first, -1), last - first)  # [n, vocab / ranks], -1: zeros

        @tf.custom_gradient
        def losses(flat: tf.Tensor) -> Any:
            largest = tf.reduce_max(flat, 1)
            exponentials = tf.exp(flat - largest[:, None])
            figures = tf.stack([largest, tf.reduce_sum(exponentials, 1), tf.reduce_sum(flat * hot, 1)])
            said = self.group.all_gather_async(figures, "tensor.cross_entropy").wait()
            said = tf.reshape(said, [self.size, 3, -1])
            top = tf.reduce_max(said[:, 0], 0)
            total = tf.reduce_sum(said[:, 1] * tf.exp(said[:, 0] - top), 0)
            shares = exponentials * (tf.exp(largest - top) / total)[:, None]

            def backward(gradient: tf.Tensor) -> tf.Tensor:
                return (shares - hot) * gradient[:, None]

            return tf.math.log(total) + top - tf.reduce_sum(said[:, 2], 0), backward

        return tf.reshape(losses(flat), tf.shape(targets))

    def all_scores(self, scores: tf.Tensor) -> tf.Tensor:
        """Return ``[rows, vocab]`` from this rank's part of them."""
        if self.size == 1:
            return scores
        return tf.transpose(self.group.all_gather_async(_wide(tf.transpose(scores)), "tensor.scores").wait())

    def _sum(self, x: tf.Tensor, name: str) -> tf.Tensor:
        """Return the sum over ranks; half precision, which Horovod can't sum, travels as float32."""
        return tf.cast(self.group.all_reduce_async(_wide(x), name).wait(), x.dtype)

    def _scatter(self, x: tf.Tensor, name: str) -> tf.Tensor:
        """Return this rank's positions ``[rows, time / ranks, embed]`` of the sum of ranks' ``[rows, time, embed]``."""
        first = _wide(tf.transpose(x, [1, 0, 2]))  # [time, rows, embed]
        part = tf.transpose(self.group.reduce_scatter_async(first, name).wait(), [1, 0, 2])
        return tf.ensure_shape(tf.cast(part, x.dtype), [x.shape[0], x.shape[1] // self.size, x.shape[2]])

    def _gather(self, x: tf.Tensor, name: str) -> tf.Tensor:
        """Return ``[rows, time, embed]`` from ranks' positions ``[rows, time / ranks, embed]``."""
        first = _wide(tf.transpose(x, [1, 0, 2]))
        whole = tf.transpose(self.group.all_gather_async(first, name).wait(), [1, 0, 2])
        return tf.ensure_shape(tf.cast(whole, x.dtype), [x.shape[0], x.shape[1] * self.size, x.shape[2]])

    def _sum_gradient(self, x: tf.Tensor, name: str) -> tf.Tensor:
        @tf.custom_gradient
        def entered(x: tf.Tensor) -> Any:
            return tf.identity(x), lambda gradient: self._sum(gradient, f"{name}.backward")

        return entered(x)

    def _sum_forward(self, x: tf.Tensor, name: str) -> tf.Tensor:
        @tf.custom_gradient
        def left(x: tf.Tensor) -> Any:
            return self._sum(x, name), lambda gradient: gradient

        return left(x)

    def _gather_time(self, x: tf.Tensor, name: str) -> tf.Tensor:
        @tf.custom_gradient
        def entered(x: tf.Tensor) -> Any:
            return self._gather(x, f"{name}.gather"), lambda gradient: self._scatter(gradient, f"{name}.backward")

        return entered(x)

    def _scatter_time(self, x: tf.Tensor, name: str) -> tf.Tensor:
        @tf.custom_gradient
        def left(x: tf.Tensor) -> Any:
            return self._scatter(x, f"{name}.scatter"), lambda gradient: self._gather(gradient, f"{name}.backward")

        return left(x)


def _wide(x: tf.Tensor) -> tf.Tensor:
    return tf.cast(x, tf.float32)
