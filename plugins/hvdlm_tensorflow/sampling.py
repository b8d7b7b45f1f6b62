"""Tokens chosen from scores on the device, by temperature, top-k and top-p."""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf

from hvdlm.protocols.inference import SamplingRule

_TINY = 1e-300  # the lowest temperature whose reciprocal is finite, with room: differences are 1e-45 or more


def choose(scores: tf.Tensor, uniform: tf.Tensor, rule: SamplingRule) -> tf.Tensor:
    """Return int32 ``[rows, draws]``, the tokens that ``SamplesTokens.sample`` chooses.

    ``scores``: float32 ``[rows, vocab]``; ``uniform``: float64 ``[rows, draws]``; ``rule``: all but ``vocab`` and the
    temperature 0 may be tensors, of which a graph is traced once.
    """
    scores = scores[:, : rule.vocab]
    finite = tf.reduce_all(scores < math.inf, 1, keepdims=True)
    if not tf.is_tensor(rule.temperature) and rule.temperature == 0:
        best = tf.argmax(scores, 1, output_type=tf.int32)[:, None]
        return tf.broadcast_to(tf.where(finite, best, -1), tf.shape(uniform))
    count: Any = tf.shape(scores)[1]
    count = tf.where(rule.top_k > 0, tf.minimum(rule.top_k, count), count)
    falling, tokens = tf.math.top_k(scores, count)  # of equal scores, the lower token is first
    wide = tf.cast(falling, tf.float64)
    temperature = tf.maximum(tf.convert_to_tensor(rule.temperature, tf.float64), _TINY)
    sums = tf.cumsum(tf.exp((wide - wide[:, :1]) / temperature), 1)
    below = tf.cast(sums < rule.top_p * sums[:, -1:], tf.int32)
    last = tf.minimum(tf.reduce_sum(below, 1, keepdims=True), count - 1)
    drawn = tf.searchsorted(sums, uniform * tf.gather(sums, last, batch_dims=1), side="right")
    chosen = tf.gather(tokens, tf.minimum(drawn, last), batch_dims=1)
    return tf.where(finite, chosen, -1)
