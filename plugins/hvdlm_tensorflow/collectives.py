"""The collectives of tensor parallelism within a layer, through which gradients flow.

``enter`` and ``leave`` are f and g of Shoeybi et al. 2019, figure 3; under sequence parallelism they become g and
g-bar of Korthikanti et al. 2022, figure 5. With one tensor rank all are the identity.

Activations and their gradients are sent in the precision of the step. A sum over n ranks in bf16 or fp16 is rounded up
to n - 1 times, by at most half a unit in the last place of a partial sum each.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import tensorflow as tf

from hvdlm.protocols.group import Converted, Group, Handle
from hvdlm_language.loss_terms import LossTerms
from hvdlm_language.tensor_ranks import TensorRanks
from hvdlm_tensorflow.losses import is_highest
from hvdlm_tensorflow.shapes import sizes


class Collectives(TensorRanks):
    """The collectives of one tensor group.

    A graph runs independent operations concurrently: no two collectives may have the same name.
    """

    def enter(self, x: tf.Tensor, name: str) -> tf.Tensor:
        """Return ``x`` ``[rows, time, embed]``, the input of a column-parallel product; its gradient is summed."""
        if self.size == 1:
            return x
        return (_gather_time if self.sequence else _sum_gradient)(x, self.group, f"tensor.{name}")

    def columns(
        self, x: tf.Tensor, weights: Sequence[tf.Tensor], biases: Sequence[tf.Tensor], name: str
    ) -> Sequence[tf.Tensor]:
        """Return the products of ``enter(x)`` ``[rows, time, embed]`` and this rank's columns of several weights.

        In the backward pass, the sum of the gradient of ``x`` travels while those of the weights are computed, as in
        Megatron-LM (``LinearWithGradAccumulationAndAsyncCommunication``).

        Args:
            x: the input; with ``sequence``, this rank's positions.
            weights: ``[embed, outputs / ranks]``.
            biases: one for each weight, or none.
            name: of the collectives.
        """
        products: Sequence[tf.Tensor]
        if self.size == 1:
            products = [linear(x, weight) for weight in weights]
        else:
            products = _columns(x, weights, self.group, f"tensor.{name}", self.sequence)
        return [tf.nn.bias_add(y, b) for y, b in zip(products, biases, strict=True)] if biases else products

    def scores(self, x: tf.Tensor, table: tf.Tensor, bias: tf.Tensor | None = None, name: str = "head") -> tf.Tensor:
        """Return the product of ``enter(x)`` and this rank's range of the vocabulary; see ``columns``.

        ``table``: ``[vocab / ranks, embed]``; ``bias``: ``[vocab / ranks]``.
        """
        if self.size == 1:
            scores = linear(x, table, True)
        else:
            (scores,) = _columns(x, [table], self.group, f"tensor.{name}", self.sequence, True)
        return scores if bias is None else tf.nn.bias_add(scores, bias)

    def leave(self, x: tf.Tensor, name: str) -> tf.Tensor:
        """Return the sum over ranks of ``x`` ``[rows, time, embed]``; with ``sequence``, this rank's positions."""
        if self.size == 1:
            return x
        return (_scatter_time if self.sequence else _sum_forward)(x, self.group, f"tensor.{name}")

    def join(self, x: tf.Tensor, name: str) -> tf.Tensor:
        """Return ``[rows, hidden]`` from ranks' ``x`` ``[rows, hidden / ranks]``; the gradients of it are summed."""
        whole = _join(x, self.group, f"tensor.{name}")
        whole.set_shape([x.shape[0], x.shape[1] * self.size])
        return whole

    def shared(self, p: Mapping[str, tf.Tensor], names: Collection[str], name: str) -> Mapping[str, tf.Tensor]:
        """Return ``p``, of whose replicated parameters ``names`` the gradients are summed, in one all-reduce."""
        if not names:
            return p
        parameters = _sum_gradients([p[n] for n in names], self.group, f"tensor.{name}.shared")
        return {**p, **dict(zip(names, parameters, strict=True))}

    def embedding(self, tokens: tf.Tensor, table: tf.Tensor) -> tf.Tensor:
        """Return rows of a table of which this rank holds a range, zeros for tokens outside of it."""
        if self.size == 1:
            return tf.gather(table, tokens)
        first, last = self.model_shard.range_of(self.model_shard.vocab)
        inside = (tokens >= first) & (tokens < last)
        rows = tf.gather(table, tf.where(inside, tokens - first, 0))
        return rows * tf.cast(inside, rows.dtype)[..., None]

    def cross_entropy(self, scores: tf.Tensor, targets: tf.Tensor, terms: LossTerms) -> tf.Tensor:
        """Return losses ``[rows, time]`` in nats from this rank's ``scores`` ``[rows, time, vocab / ranks]``."""
        if self.size == 1:
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=targets, logits=scores)
            if terms == LossTerms():
                return losses
            log_sum = tf.reduce_logsumexp(scores, -1)
            spread = terms.smoothing * (log_sum - tf.reduce_mean(scores, -1)) if terms.smoothing else 0.0
            return (1.0 - terms.smoothing) * losses + spread + terms.z_loss * tf.square(log_sum)
        flat_scores, hot = self._one_hot(scores, targets)
        return tf.reshape(
            _cross_entropy(flat_scores, hot, self.group, self.model_shard.vocab, terms), tf.shape(targets)
        )

    def evaluated(self, scores: tf.Tensor, targets: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the cross entropies ``[rows, time]`` in nats of ``targets``, and ``is_highest`` of them."""
        if self.size == 1:
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=targets, logits=scores)
            return losses, is_highest(scores, targets)
        figures = _Figures(*self._one_hot(scores, targets), self.group, LossTerms())
        flat = figures.log_sum - figures.score, figures.score >= figures.top
        return tf.reshape(flat[0], tf.shape(targets)), tf.reshape(flat[1], tf.shape(targets))

    def _one_hot(self, scores: tf.Tensor, targets: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Return flat scores and, of this rank's range, one-hot targets, ``[n, vocab / ranks]`` both."""
        first, last = self.model_shard.range_of(self.model_shard.vocab)
        flat_scores, flat_targets = tf.reshape(scores, [-1, last - first]), tf.reshape(targets, [-1])
        here = (flat_targets >= first) & (flat_targets < last)
        # Of index -1 a row of zeros.
        return flat_scores, tf.one_hot(tf.where(here, flat_targets - first, -1), last - first)

    def all_scores(self, scores: tf.Tensor) -> tf.Tensor:
        """Return ``[rows, vocab]`` from ranks' ``scores`` ``[rows, vocab / ranks]``."""
        if self.size == 1:
            return scores
        return tf.transpose(self.group.all_gather_async(_float32(tf.transpose(scores)), "tensor.scores").wait())


def _sum_gradient(x: tf.Tensor, group: Group, name: str) -> tf.Tensor:
    """f: the identity forward, an all-reduce backward."""

    @tf.custom_gradient
    def function(x: tf.Tensor) -> Any:
        return tf.identity(x), lambda gradient: _sum(gradient, group, f"{name}.backward")

    return function(x)


def _columns(
    x: tf.Tensor, weights: Sequence[tf.Tensor], group: Group, name: str, sequence: bool, rows: bool = False
) -> Sequence[tf.Tensor]:
    """f or g, and the products behind it: weights' gradients are computed while that of the input is summed.

    TensorFlow would compute them in any order. The whole input is kept for the backward pass, also with ``sequence``:
    to keep a rank's positions, as Megatron-LM does, would gather them again, a quarter more traffic. ``rows``: weights
    are ``[outputs, embed]``.
    """

    @tf.custom_gradient
    def function(x: tf.Tensor, *weights: tf.Tensor) -> Any:
        whole = _gather(x, group, f"{name}.gather") if sequence else x

        def backward(*gradients: tf.Tensor) -> tuple[tf.Tensor, ...]:
            of_inputs = [linear(g, w, not rows) for g, w in zip(gradients, weights, strict=True)]
            of_x = tf.add_n(of_inputs)
            start = _start_scatter if sequence else _start_sum
            under_way = start(of_x, group, f"{name}.backward")
            inputs, outputs = _flat(whole), [_flat(g) for g in gradients]
            with tf.control_dependencies([of_x]):
                pairs = [(o, inputs) if rows else (inputs, o) for o in outputs]
                of_weights = [tf.matmul(left, right, transpose_a=True) for left, right in pairs]
            return under_way.wait(), *of_weights

        return tuple(linear(whole, weight, rows) for weight in weights), backward

    return function(x, *weights)


class GatheredMatrix:
    """A weight ``[inputs, outputs]`` that is gathered again for its backward pass, which sets ``gradient``.

    Attributes:
        values: those of the forward pass; from the backward pass on, those of the backward pass.
        after: what the gradient's computation waits for.
        gradient: of the weight.
    """

    after: Sequence[tf.Tensor] = ()
    gradient: tf.Tensor | None = None

    def __init__(self, values: tf.Tensor) -> None:
        self.values = values

    def product(self, x: tf.Tensor) -> tf.Tensor:
        """Return ``x`` ``[..., inputs]`` times the weight. Only ``x`` is kept for the backward pass."""

        @tf.custom_gradient
        def function(x: tf.Tensor) -> Any:
            def backward(gradient: tf.Tensor) -> tf.Tensor:
                of_x = linear(gradient, self.values, True)
                with tf.control_dependencies(self.after):
                    self.gradient = tf.matmul(_flat(x), _flat(gradient), transpose_a=True)
                return of_x

            return linear(x, self.values), backward

        return function(x)


def linear(x: tf.Tensor, weight: Any, rows: bool = False) -> tf.Tensor:
    """Return ``x`` ``[..., inputs]`` times ``weight`` ``[inputs, outputs]``, or with ``rows`` its transpose."""
    if isinstance(weight, GatheredMatrix):
        return weight.product(x)
    # One product of two matrices, not one per row.
    flat = tf.matmul(_flat(x), weight, transpose_b=rows)
    return tf.reshape(flat, [*sizes(x)[:-1], flat.shape[-1]])


def _flat(x: tf.Tensor) -> tf.Tensor:
    return tf.reshape(x, [-1, x.shape[-1]])


def _sum_forward(x: tf.Tensor, group: Group, name: str) -> tf.Tensor:
    """g: an all-reduce forward, the identity backward."""

    @tf.custom_gradient
    def function(x: tf.Tensor) -> Any:
        return _sum(x, group, name), lambda gradient: gradient

    return function(x)


def _gather_time(x: tf.Tensor, group: Group, name: str) -> tf.Tensor:
    """g of sequence parallelism: an all-gather of positions forward, a reduce-scatter backward."""

    @tf.custom_gradient
    def function(x: tf.Tensor) -> Any:
        return _gather(x, group, f"{name}.gather"), lambda gradient: _scatter(gradient, group, f"{name}.backward")

    return function(x)


def _scatter_time(x: tf.Tensor, group: Group, name: str) -> tf.Tensor:
    """g-bar: a reduce-scatter of positions forward, an all-gather backward."""

    @tf.custom_gradient
    def function(x: tf.Tensor) -> Any:
        return _scatter(x, group, f"{name}.scatter"), lambda gradient: _gather(gradient, group, f"{name}.backward")

    return function(x)


def _join(x: tf.Tensor, group: Group, name: str) -> tf.Tensor:
    """An all-gather of hidden units forward, a reduce-scatter backward."""

    @tf.custom_gradient
    def function(x: tf.Tensor) -> Any:
        def backward(gradient: tf.Tensor) -> tf.Tensor:
            return tf.transpose(group.reduce_scatter_async(tf.transpose(gradient), f"{name}.backward").wait())

        return tf.transpose(group.all_gather_async(tf.transpose(x), name).wait()), backward

    return function(x)


def _sum_gradients(parameters: list[tf.Tensor], group: Group, name: str) -> tuple[tf.Tensor, ...]:
    """The identity of several parameters forward, one all-reduce of their gradients backward."""

    @tf.custom_gradient
    def function(*parameters: tf.Tensor) -> Any:
        def backward(*gradients: tf.Tensor) -> list[tf.Tensor]:
            flat = tf.concat([_float32(tf.reshape(g, [-1])) for g in gradients], 0)
            total = group.all_reduce_async(flat, name).wait()
            sums = tf.split(total, [p.shape.num_elements() for p in parameters])
            return [tf.cast(tf.reshape(s, p.shape), p.dtype) for s, p in zip(sums, parameters, strict=True)]

        return tuple(tf.identity(p) for p in parameters), backward

    return function(*parameters)


class _Figures:
    """What the ranks know together of scores ``[n, vocab / ranks]`` that they share, without gathering them.

    Three figures of every target travel: a rank's largest score, its sum of exponentials relative to that, and the
    target's score, 0 where another rank has it. With smoothing, a fourth: the sum of the rank's scores.

    Attributes:
        largest, exponentials: this rank's largest score ``[n]``, and its scores' exponentials relative to that.
        top, total, log_sum, score, sums: of all ranks ``[n]``: the largest score, the sum of exponentials relative to
            it, the logarithm of the sum of exponentials, the target's score; with smoothing the sum of scores.
    """

    def __init__(self, scores: tf.Tensor, hot: tf.Tensor, group: Group, terms: LossTerms) -> None:
        self.largest = tf.reduce_max(scores, 1)
        self.exponentials = tf.exp(scores - self.largest[:, None])
        figures = [self.largest, tf.reduce_sum(self.exponentials, 1), tf.reduce_sum(scores * hot, 1)]
        figures += [tf.reduce_sum(scores, 1)] if terms.smoothing else []
        gathered = group.all_gather_async(tf.stack(figures), "tensor.cross_entropy").wait()
        gathered = tf.reshape(gathered, [len(group.ranks), len(figures), -1])  # [ranks, figure, n]
        self.top = tf.reduce_max(gathered[:, 0], 0)
        self.total = tf.reduce_sum(gathered[:, 1] * tf.exp(gathered[:, 0] - self.top), 0)
        self.log_sum = tf.math.log(self.total) + self.top
        self.score = tf.reduce_sum(gathered[:, 2], 0)
        self.sums = tf.reduce_sum(gathered[:, 3], 0) if terms.smoothing else None


def _cross_entropy(scores: tf.Tensor, hot: tf.Tensor, group: Group, vocab: int, terms: LossTerms) -> tf.Tensor:
    """Cross entropy of scores that the ranks share."""
    share, spread = 1.0 - terms.smoothing, terms.smoothing / vocab

    @tf.custom_gradient
    def function(scores: tf.Tensor) -> Any:
        figures = _Figures(scores, hot, group, terms)
        losses = figures.log_sum - share * figures.score
        factor = tf.exp(figures.largest - figures.top) / figures.total
        if figures.sums is not None:
            losses -= spread * figures.sums
        if terms.z_loss:
            losses += terms.z_loss * tf.square(figures.log_sum)
            factor *= 1.0 + 2.0 * terms.z_loss * figures.log_sum
        probabilities = figures.exponentials * factor[:, None]

        def backward(gradient: tf.Tensor) -> tf.Tensor:
            of_scores = probabilities - (share * hot if terms.smoothing else hot)
            return (of_scores - spread if terms.smoothing else of_scores) * gradient[:, None]

        return losses, backward

    return function(scores)


def _sum(x: tf.Tensor, group: Group, name: str) -> tf.Tensor:
    """Return the sum over ranks."""
    return _start_sum(x, group, name).wait()


def _start_sum(x: tf.Tensor, group: Group, name: str) -> Handle:
    """Start the sum over ranks."""
    return group.all_reduce_async(x, name)


def _scatter(x: tf.Tensor, group: Group, name: str) -> tf.Tensor:
    """Return this rank's positions ``[rows, time / ranks, embed]`` of the sum of ranks' ``[rows, time, embed]``."""
    return _start_scatter(x, group, name).wait()


def _start_scatter(x: tf.Tensor, group: Group, name: str) -> Handle:
    """Start ``_scatter``."""
    shape = [x.shape[0], x.shape[1] // len(group.ranks), x.shape[2]]
    time_first = tf.transpose(x, [1, 0, 2])  # [time, rows, embed]: collectives cut the first dimension
    under_way = group.reduce_scatter_async(time_first, name)
    return Converted(under_way, lambda shard: tf.ensure_shape(tf.transpose(shard, [1, 0, 2]), shape))


def _gather(x: tf.Tensor, group: Group, name: str) -> tf.Tensor:
    """Return ``[rows, time, embed]`` from ranks' positions ``[rows, time / ranks, embed]``."""
    whole = tf.transpose(group.all_gather_async(tf.transpose(x, [1, 0, 2]), name).wait(), [1, 0, 2])
    return tf.ensure_shape(whole, [x.shape[0], x.shape[1] * len(group.ranks), x.shape[2]])


def _float32(x: tf.Tensor) -> tf.Tensor:
    return tf.cast(x, tf.float32)
