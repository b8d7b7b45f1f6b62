"""Attention of context ranks: each gathers the keys and values of all ranks (Llama Team 2024, section 3.3.2).

A layer's gathered keys and values live as long as its attention is computed; the backward pass gathers them again, and
scatters their gradients. Chunks of positions are divided so that ranks have equal work
(``hvdlm_language.context_ranks``).

PyTorch's twin passes blocks of them round a ring of ranks, which a TensorFlow graph can't: nothing in it sends in the
background.
"""

from __future__ import annotations

import tensorflow as tf

from hvdlm_language.context_ranks import ContextRanks
from hvdlm_tensorflow.attention import attend_to_gathered


def attend_over_ranks(q: tf.Tensor, k: tf.Tensor, v: tf.Tensor, ranks: ContextRanks, name: str) -> tf.Tensor:
    """Return the causal attention of this rank's positions to those of all ranks, ``[rows, time, heads * head]``.

    Args:
        q: queries ``[rows, heads, time, head]``.
        k: keys ``[rows, kv_heads, time, head]``, each of which serves ``heads / kv_heads`` consecutive query heads.
        v: values, as ``k``.
        ranks: those that have the other positions.
        name: of the collectives.
    """
    size, (rows, kv_heads, time, head) = ranks.size, k.shape
    half = time // 2

    def gather(k: tf.Tensor, v: tf.Tensor, of_pass: str) -> tuple[tf.Tensor, tf.Tensor]:
        gathered = ranks.group.all_gather_async(tf.stack([k, v]), f"{name}.{of_pass}").wait()
        by_chunk = tf.reshape(gathered, [size, 2, rows, kv_heads, 2, half, head])
        by_chunk = tf.transpose(by_chunk, [1, 2, 3, 4, 0, 5, 6])  # [2, rows, kv_heads, 2, ranks, half, head]
        # The second chunks are in the reverse order of their ranks.
        in_order = tf.concat([by_chunk[:, :, :, 0], by_chunk[:, :, :, 1, ::-1]], 3)
        keys, values = tf.unstack(tf.reshape(in_order, [2, rows, kv_heads, size * time, head]))
        return keys, values

    def scatter(of_k: tf.Tensor, of_v: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        in_order = tf.reshape(tf.stack([of_k, of_v]), [2, rows, kv_heads, 2, size, half, head])
        by_chunk = tf.stack([in_order[:, :, :, 0], in_order[:, :, :, 1, ::-1]], 3)
        by_rank = tf.transpose(by_chunk, [4, 0, 1, 2, 3, 5, 6])  # [ranks, 2, rows, kv_heads, 2, half, head]
        flat = tf.reshape(by_rank, [size * 2, rows, kv_heads, time, head])
        own = ranks.group.reduce_scatter_async(flat, f"{name}.gradient").wait()
        keys, values = tf.unstack(tf.ensure_shape(own, [2, rows, kv_heads, time, head]))
        return keys, values

    return attend_to_gathered(q, k, v, tuple(chunk * half for chunk in ranks.chunks), gather, scatter)
