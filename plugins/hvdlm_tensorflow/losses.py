"""Losses of whole rows, in TensorFlow."""

from __future__ import annotations

import tensorflow as tf


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
