"""Losses of whole rows, in TensorFlow."""

from __future__ import annotations

import tensorflow as tf


def ctc(scores: tf.Tensor, lengths: tf.Tensor, targets: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """Return minus log of the probability of every row's targets (Graves et al. 2006, eq. 8), float32 ``[rows]``.

    ``scores`` ``[rows, frames, vocab]`` up to ``lengths`` ``[rows]``, id 0 the blank; ``targets`` ``[rows, time]``
    where ``weights`` are 1. A row whose targets don't fit into its frames counts nothing.
    """
    # The operation itself, whose blank is the last id: tf.nn.ctc_loss makes loops that Grappler complains about.
    rolled = tf.roll(tf.transpose(scores, [1, 0, 2]), -1, 2)  # [frames, rows, vocab]
    again = tf.cast(targets[:, 1:] == targets[:, :-1], tf.float32) * weights[:, 1:]  # a blank has to part them
    fits = tf.cast(lengths, tf.float32) >= tf.reduce_sum(weights, 1) + tf.reduce_sum(again, 1)
    # The operation takes no row that doesn't fit, and none without a label: of such the first stays, to no effect.
    first = tf.range(tf.shape(targets)[1]) == 0
    places = tf.where((weights > 0) & (fits[:, None] | first))
    losses, _ = tf.raw_ops.CTCLoss(
        inputs=rolled,
        labels_indices=places,
        labels_values=tf.gather_nd(targets, places) - 1,
        sequence_length=lengths,
        preprocess_collapse_repeated=False,
        ctc_merge_repeated=True,
        ignore_longer_outputs_than_inputs=False,
    )
    return tf.where(fits, losses, 0.0)
