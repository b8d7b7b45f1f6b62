"""Self-attention that keeps no weights for its backward pass, which computes them again in chunks of queries.

Rabe and Staats 2021, "Self-attention does not need O(n^2) memory", and Dao et al. 2022, "FlashAttention", algorithm 4.
All keys of a chunk are computed with at once, so that its softmax needs no running maximum.

Without a twin: PyTorch has ``scaled_dot_product_attention``.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import tensorflow as tf

# As fast as any others on a CPU (benchmarks/tensorflow_attention.py).
_CHUNK = 64
_MOST_CHUNKS = 8
_ONE_CHUNK = 128  # positions up to which chunks are slower than keeping the weights


def attend(q: tf.Tensor, k: tf.Tensor, v: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """Return the attention of ``q`` ``[rows, heads, time, head]``: ``[rows, time, heads * head]``.

    Args:
        q: queries; products are computed in their dtype, the softmax in float32.
        k: keys ``[rows, kv_heads, keys, head]``, each of which serves ``heads / kv_heads`` consecutive query heads.
        v: values, as ``k``.
        mask: float32 ``[time, keys]``, added to the scores.
    """
    return _side_by_side(_ungrouped(tf.matmul(_weights(_grouped(_scaled(q), k), k, mask), v), q))


def attend_causally(q: tf.Tensor, k: tf.Tensor, v: tf.Tensor, longest: int) -> tf.Tensor:
    """Return the attention of positions to themselves and those before; see ``attend``.

    ``longest``: the number of positions, if it is open in the graph: the most that there may be. The gradient is of
    first order only.
    """
    time = _sizes(q)[2]
    count = chunk_count(longest if q.shape[2] is None else time)
    if count == 1:
        return attend(q, k, v, _causal(0, time))
    ends = [time * i // count for i in range(count + 1)]
    return _in_chunks(q, k, v, list(pairwise(ends)))


def chunk_count(time: int) -> int:
    """Return how many chunks the queries of ``time`` positions are computed in."""
    return 1 if time <= _ONE_CHUNK else min(_MOST_CHUNKS, time // _CHUNK)


def _in_chunks(q: tf.Tensor, k: tf.Tensor, v: tf.Tensor, chunks: list[tuple[Any, Any]]) -> tf.Tensor:
    """Return causal attention; of each chunk ``start, stop`` of queries, keys from ``stop`` on are left out."""

    @tf.custom_gradient
    def function(q: tf.Tensor, k: tf.Tensor, v: tf.Tensor) -> Any:
        q = _scaled(q)
        outputs: list[tf.Tensor] = []
        for start, stop in chunks:
            # One chunk after the other: together, they would take the memory of all weights.
            with tf.control_dependencies(outputs[-1:]):
                queries = q[:, :, start:stop]
                weights = _weights(_grouped(queries, k), k[:, :, :stop], _causal(start, stop))
                outputs.append(_ungrouped(tf.matmul(weights, v[:, :, :stop]), queries))
        output = _side_by_side(tf.concat(outputs, 2))

        def backward(gradient: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            of_q, of_k, of_v = _gradients(q, k, v, output, gradient, chunks)
            return _scaled(of_q), of_k, of_v

        return output, backward

    return function(q, k, v)


def _gradients(
    q: tf.Tensor, k: tf.Tensor, v: tf.Tensor, output: tf.Tensor, gradient: tf.Tensor, chunks: list[tuple[Any, Any]]
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Return the gradients of scaled queries, keys and values from that of the output."""
    rows, heads, time, head = _sizes(q)
    by_head = [rows, time, heads, head]
    gradient, output = tf.reshape(gradient, by_head), tf.reshape(output, by_head)
    # Rows of softmax's Jacobian: the product with the output equals that of the weights with their gradient.
    products = tf.reduce_sum(tf.cast(gradient, tf.float32) * tf.cast(output, tf.float32), -1, keepdims=True)
    products, gradient = tf.transpose(products, [0, 2, 1, 3]), tf.transpose(gradient, [0, 2, 1, 3])
    of_q: list[tf.Tensor] = []
    of_k: list[tf.Tensor] = []
    of_v: list[tf.Tensor] = []
    earlier: list[tf.Tensor] = []  # gradients of the keys and values that earlier chunks have, too
    # From the last chunk on: with each, the sums of its own keys and values are complete.
    for start, stop in reversed(chunks):
        with tf.control_dependencies(of_q[-1:] + earlier):
            queries, of_output = _grouped(q[:, :, start:stop], k), _grouped(gradient[:, :, start:stop], k)
            keys, values = k[:, :, :stop], v[:, :, :stop]
            weights = _weights(queries, keys, _causal(start, stop))
            of_weights = tf.cast(tf.matmul(of_output, values, transpose_b=True), tf.float32)
            of_scores = (of_weights - _grouped(products[:, :, start:stop], k)) * tf.cast(weights, tf.float32)
            of_scores = tf.cast(of_scores, q.dtype)
            of_q.append(_ungrouped(tf.matmul(of_scores, keys), q[:, :, start:stop]))
            sums = [tf.matmul(of_scores, queries, transpose_a=True), tf.matmul(weights, of_output, transpose_a=True)]
            sums = [total + added for total, added in zip(earlier, sums, strict=True)] if earlier else sums
            of_k.append(sums[0][:, :, start:])
            of_v.append(sums[1][:, :, start:])
            earlier = [total[:, :, :start] for total in sums]
    whole_q, whole_k, whole_v = (tf.concat(parts[::-1], 2) for parts in (of_q, of_k, of_v))
    return whole_q, whole_k, whole_v


def _weights(q: tf.Tensor, k: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """Return the weights ``[rows, kv_heads, group * time, keys]`` of scaled and grouped queries."""
    scores = tf.matmul(q, k, transpose_b=True)
    rows, _, _, keys = sizes = _sizes(scores)
    by_head = tf.reshape(tf.cast(scores, tf.float32), [rows, -1, _sizes(mask)[0], keys])
    return tf.cast(tf.reshape(tf.nn.softmax(by_head + mask), sizes), q.dtype)


def _grouped(q: tf.Tensor, k: tf.Tensor) -> tf.Tensor:
    """Return ``[rows, heads, time, size]`` as ``[rows, kv_heads, group * time, size]``: one product for a group."""
    rows, heads, time, size = _sizes(q)
    return tf.reshape(q, [rows, k.shape[1], heads // k.shape[1] * time, size])


def _ungrouped(x: tf.Tensor, q: tf.Tensor) -> tf.Tensor:
    """Return grouped ``x`` in the shape of the queries ``q``."""
    return tf.reshape(x, _sizes(q))


def _side_by_side(x: tf.Tensor) -> tf.Tensor:
    """Return ``[rows, heads, time, head]`` as ``[rows, time, heads * head]``."""
    rows, heads, time, head = _sizes(x)
    return tf.reshape(tf.transpose(x, [0, 2, 1, 3]), [rows, time, heads * head])


def _scaled(q: tf.Tensor) -> tf.Tensor:
    return q * q.shape[-1] ** -0.5


def _causal(start: Any, stop: Any) -> tf.Tensor:
    """Return float32 ``[stop - start, stop]``: 0 where a query from ``start`` on sees a key, else minus infinity."""
    return tf.where(tf.range(stop)[None] <= tf.range(start, stop)[:, None], 0.0, -np.inf)


def _sizes(x: tf.Tensor) -> list[Any]:
    """Return the sizes of ``x``, as integers where the graph knows them."""
    sizes = tf.shape(x)
    return [sizes[i] if size is None else size for i, size in enumerate(x.shape)]
