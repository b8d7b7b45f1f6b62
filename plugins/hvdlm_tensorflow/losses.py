"""Losses of the last layer's output, in TensorFlow."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from hvdlm_language.loss_terms import LossTerms

# Logits that are held at a time, 128 MiB: each chunk reads and writes the gradient of the whole head. On a CPU, head
# and loss of 1,024 targets, width 384 and a vocabulary of 50,304 take 1.08 times the time with chunks of 2**24 logits,
# and 1.3 times with 2**22.
_CHUNK = 2**25
_MOST_CHUNKS = 16  # each is a part of the graph


def ctc(scores: tf.Tensor, lengths: tf.Tensor, targets: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """Return the CTC loss of every row (Graves et al. 2006, eq. 8), float32 ``[rows]``.

    That is minus the logarithm of the probability of its targets in any alignment with its frames. A row has
    ``lengths`` ``[rows]`` frames of ``scores`` ``[rows, frames, vocab]``, id 0 being the blank, and the ``targets``
    ``[rows, time]`` whose ``weights`` are 1. A row whose targets don't fit into its frames has loss 0.
    """
    # The operation itself, whose blank is the last id: tf.nn.ctc_loss makes loops that Grappler complains about.
    rolled = tf.roll(tf.transpose(scores, [1, 0, 2]), -1, 2)  # [frames, rows, vocab]
    # Equal neighbours need a frame more, for a blank between them.
    repeated = tf.cast(targets[:, 1:] == targets[:, :-1], tf.float32) * weights[:, 1:]
    fits = tf.cast(lengths, tf.float32) >= tf.reduce_sum(weights, 1) + tf.reduce_sum(repeated, 1)
    # The operation refuses a row whose labels don't fit, and one without a label: such a row keeps its first label, and
    # its loss is dropped below.
    first = tf.range(tf.shape(targets)[1]) == 0
    indices = tf.where((weights > 0) & (fits[:, None] | first))
    losses, _ = tf.raw_ops.CTCLoss(
        inputs=rolled,
        labels_indices=indices,
        labels_values=tf.gather_nd(targets, indices) - 1,
        sequence_length=lengths,
        preprocess_collapse_repeated=False,
        ctc_merge_repeated=True,
        ignore_longer_outputs_than_inputs=False,
    )
    return tf.where(fits, losses, 0.0)


def rows_of_chunk(targets: int, vocab: int) -> int:
    """Return of how many ``targets`` the logits are computed at a time by ``chunked_cross_entropy``."""
    return max(1, _CHUNK // vocab, -(-targets // _MOST_CHUNKS))


def chunked_cross_entropy(
    hidden: tf.Tensor,
    head: tf.Tensor,
    bias: tf.Tensor | None,
    targets: tf.Tensor,
    weights: tf.Tensor | None,
    terms: LossTerms,
    wanted: tuple[bool, bool],
) -> tf.Tensor:
    """Return the losses in nats, float32 ``[n]``, of ``targets`` ``[n]``, times their ``weights`` ``[n]``.

    The logits ``hidden @ head.T + bias`` are never held as a whole: each chunk's are computed, and at once their
    gradients, as in Liger Kernel (Hsu et al. 2024). These are the gradients of the sum of the losses, times any factor;
    those of another function of the losses are nan.

    Args:
        hidden: ``[n, embed]``; products are computed in its dtype.
        head: ``[vocab, embed]``.
        bias: ``[vocab]``.
        targets: int32.
        weights: None: all 1.
        terms: what is added to the cross entropy.
        wanted: whether gradients of the hidden states, and of the head and its bias are computed.
    """
    inputs = [hidden, head] if bias is None else [hidden, head, bias]

    @tf.custom_gradient
    def function(*inputs: tf.Tensor) -> Any:
        losses, gradients = _in_chunks(inputs, targets, weights, terms, wanted)

        def backward(gradient: tf.Tensor) -> list[tf.Tensor | None]:
            largest = tf.reduce_max(gradient)
            factor = tf.where(tf.reduce_min(gradient) == largest, largest, np.nan)
            scaled = [tf.cast(g * factor, x.dtype) for g, x in zip(gradients, inputs, strict=False)]
            return scaled + [None] * (len(inputs) - len(scaled))

        return losses, backward

    return function(*inputs)


def chunked_evaluation(
    hidden: tf.Tensor, head: tf.Tensor, bias: tf.Tensor | None, targets: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the cross entropies in nats, float32 ``[n]``, and ``is_highest`` of ``targets`` ``[n]``; no gradients.

    The arguments are those of ``chunked_cross_entropy``.
    """
    rows = rows_of_chunk(hidden.shape[0], head.shape[0])
    losses: list[tf.Tensor] = []
    highest: list[tf.Tensor] = []
    for start in range(0, hidden.shape[0], rows):
        with tf.control_dependencies([*losses[-1:], *highest[-1:]]):  # one chunk after the other
            logits = _logits(hidden[start : start + rows], head, bias)
            target = targets[start : start + rows]
            losses.append(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=target, logits=logits))
            highest.append(is_highest(logits, target))
    return tf.concat(losses, 0), tf.concat(highest, 0)


def is_highest(scores: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """Return of which ``targets`` ``[...]`` no other token has higher ``scores`` ``[..., vocab]``, bool ``[...]``."""
    return tf.gather(scores, targets, batch_dims=targets.shape.rank) >= tf.reduce_max(scores, -1)


def _logits(hidden: tf.Tensor, head: tf.Tensor, bias: tf.Tensor | None) -> tf.Tensor:
    """Return the logits of hidden states ``[n, embed]``, float32 ``[n, vocab]``."""
    logits = tf.matmul(hidden, head, transpose_b=True)
    return tf.cast(logits if bias is None else tf.nn.bias_add(logits, bias), tf.float32)


def _in_chunks(
    inputs: tuple[tf.Tensor, ...],
    targets: tf.Tensor,
    weights: tf.Tensor | None,
    terms: LossTerms,
    wanted: tuple[bool, bool],
) -> tuple[tf.Tensor, list[tf.Tensor]]:
    """Return the losses and the wanted gradients of their sum, float32, in the order of ``inputs``."""
    hidden, head, *bias = inputs
    rows = rows_of_chunk(hidden.shape[0], head.shape[0])
    losses: list[tf.Tensor] = []
    of_hidden: list[tf.Tensor] = []
    sums: list[tf.Tensor] = []  # gradients of the head and the bias
    for start in range(0, hidden.shape[0], rows):
        chunk = slice(start, start + rows)
        # One chunk after the other: together, they would take the memory of all logits.
        with tf.control_dependencies([*losses[-1:], *of_hidden[-1:], *sums]):
            x = hidden[chunk]
            logits = _logits(x, head, bias[0] if bias else None)
            loss, gradient = _loss_and_gradient(logits, targets[chunk], terms)
            if weights is not None:
                loss, gradient = loss * weights[chunk], gradient * weights[chunk][:, None]
            losses.append(loss)
            of_bias = [tf.reduce_sum(gradient, 0)] if bias else []
            gradient = tf.cast(gradient, x.dtype)
            if wanted[0]:
                of_hidden.append(tf.cast(tf.matmul(gradient, head), tf.float32))
            if wanted[1]:
                added = [tf.cast(tf.matmul(gradient, x, transpose_a=True), tf.float32), *of_bias]
                sums = [total + more for total, more in zip(sums, added, strict=True)] if sums else added
    return tf.concat(losses, 0), [tf.concat(of_hidden, 0), *sums] if wanted[0] else []


def _loss_and_gradient(logits: tf.Tensor, targets: tf.Tensor, terms: LossTerms) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the losses ``[n]`` of float32 ``logits`` ``[n, vocab]``, and the gradients of these."""
    losses, gradient = tf.raw_ops.SparseSoftmaxCrossEntropyWithLogits(features=logits, labels=targets)
    if terms == LossTerms():
        return losses, gradient
    scores, vocab = tf.gather(logits, targets, batch_dims=1), logits.shape[-1]
    log_sum = losses + scores
    if terms.z_loss:
        probabilities = gradient + tf.one_hot(targets, vocab)
        losses += terms.z_loss * tf.square(log_sum)
        gradient += 2.0 * terms.z_loss * log_sum[:, None] * probabilities
    if terms.smoothing:  # a uniform target in place of a share of the target
        losses += terms.smoothing * (scores - tf.reduce_mean(logits, -1))
        gradient += tf.one_hot(targets, vocab, terms.smoothing, 0.0) - terms.smoothing / vocab
    return losses, gradient
