"""Attention that keeps no weights for its backward pass, which computes them again in chunks of queries.

Rabe and Staats 2021, "Self-attention does not need O(n^2) memory"; the gradients are those of Dao et al. 2022,
"FlashAttention", algorithm 4. A chunk is computed with all of its keys at once, so that its softmax needs no running
maximum.

PyTorch's twin calls ``scaled_dot_product_attention``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from hvdlm_tensorflow.shapes import sizes

# Causal attention forward and backward in chunks, on one thread of a CPU, is 1.1 times as fast with 192 positions as
# the plain formula, 1.2 times with 256, 1.3 with 512 and 1.5 with 1024; smaller or more chunks are not faster
# (benchmarks/tensorflow_chunks.py measures whole steps).
_CHUNK = 64
_MOST_CHUNKS = 8
_ONE_CHUNK = 128  # positions up to which chunks are slower: by 2 to 15%


class _Chunk(NamedTuple):
    """Queries ``start:stop``, which see none but the keys ``first:keys``."""

    start: Any
    stop: Any
    keys: Any
    first: Any = 0


Mask = Callable[[_Chunk], Any]
"""Returns what is added to the scores of a chunk, float32 that broadcasts to ``[rows, heads, time, keys]``."""
Gather = Callable[[tf.Tensor, tf.Tensor, str], tuple[tf.Tensor, tf.Tensor]]
"""(keys, values, name of the pass) -> those of all ranks."""
Scatter = Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]
"""(gradients of all keys, of all values) -> the sums of ranks' gradients of this rank's."""


def attend(q: tf.Tensor, k: tf.Tensor, v: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
    """Return the attention of ``q`` ``[rows, heads, time, head]``: ``[rows, time, heads * head]``.

    The gradient is of first order only.

    Args:
        q: queries; products are computed in their dtype, the softmax in float32.
        k: keys ``[rows, kv_heads, keys, head]``, each of which serves ``heads / kv_heads`` consecutive query heads.
        v: values, as ``k``.
        mask: added to the scores: float32 that broadcasts to ``[rows, heads, time, keys]``. None: all keys are seen.
    """
    ends = _ends(q, 0)
    chunks = [_Chunk(a, b, sizes(k)[2]) for a, b in pairwise(ends)]

    def of_chunk(chunk: _Chunk) -> tf.Tensor | None:
        if mask is None or mask.shape[-2] == 1 or len(chunks) == 1:  # as it is for all queries of a chunk
            return mask
        return mask[..., chunk.start : chunk.stop, :]

    return _attend(q, k, v, chunks, of_chunk)


def attend_causally(
    q: tf.Tensor, k: tf.Tensor, v: tf.Tensor, longest: int, window: int = 0, starts: tf.Tensor | None = None
) -> tf.Tensor:
    """Return the attention of positions to themselves and those before; see ``attend``.

    Args:
        q, k, v: as of ``attend``.
        longest: the number of positions, if it is open in the graph: the most that there may be.
        window: the positions that a query sees, itself and those before it; 0: all.
        starts: of rows that are divided into documents: ``Batch.document_starts``.
    """
    ends = _ends(q, longest)
    mask: Mask = _causal
    chunks = [_Chunk(a, b, b) for a, b in pairwise(ends)]
    if window and window < (q.shape[2] or longest):
        chunks = [_Chunk(a, b, b, _largest(0, a - window + 1)) for a, b in pairwise(ends)]
        mask = partial(_local, window=window)
    if starts is not None:
        mask = partial(_of_documents, starts=starts, causal=mask)
    return _attend(q, k, v, chunks, mask)


def attend_to_gathered(
    q: tf.Tensor, k: tf.Tensor, v: tf.Tensor, offsets: tuple[int, ...], gather: Gather, scatter: Scatter
) -> tf.Tensor:
    """Return the causal attention of this rank's queries to the keys of all ranks; see ``attend``.

    What was gathered is not kept for the backward pass, which gathers it again.

    Args:
        q: queries, in as many equal chunks as there are ``offsets``.
        k, v: keys and values of this rank.
        offsets: the position of the first query of every chunk, ascending.
        gather: returns all keys and values, ``[rows, kv_heads, keys, head]``.
        scatter: returns the gradients of ``k`` and ``v`` from those of all keys and values, float32.
    """
    length = q.shape[2] // len(offsets)
    count = chunk_count(length)
    ends = [length * i // count for i in range(count + 1)]
    bounds = [(i * length, offset, a, b) for i, offset in enumerate(offsets) for a, b in pairwise(ends)]
    chunks = [_Chunk(first + a, first + b, offset + b) for first, offset, a, b in bounds]

    @tf.custom_gradient
    def function(q: tf.Tensor, k: tf.Tensor, v: tf.Tensor) -> Any:
        q = _scaled(q)
        output = _output(q, *gather(k, v, "forward"), chunks, _causal)

        def backward(gradient: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            with tf.control_dependencies([gradient]):  # not in the forward pass, where all it needs is there
                keys, values = gather(tf.identity(k), tf.identity(v), "backward")
            of_q, of_k, of_v = _gradients(q, keys, values, output, gradient, chunks, _causal)
            unseen = [[0, 0], [0, 0], [0, keys.shape[2] - chunks[-1].keys], [0, 0]]
            of_k, of_v = scatter(tf.pad(of_k, unseen), tf.pad(of_v, unseen))
            return _scaled(of_q), tf.cast(of_k, k.dtype), tf.cast(of_v, v.dtype)

        return output, backward

    return function(q, k, v)


def causal_mask(start: Any, time: Any, keys: int, window: int) -> tf.Tensor:
    """Return what is added to the scores of ``time`` queries from position ``start`` on, float32 ``[time, keys]``.

    Of starts ``[rows, 1, 1, 1]`` it is ``[rows, 1, time, keys]``. ``window``: see ``attend_causally``.
    """
    distance = start + tf.range(time)[:, None] - tf.range(keys)[None, :]
    seen = distance >= 0
    return tf.where(seen & (distance < window) if window else seen, 0.0, -np.inf)


def _causal(chunk: _Chunk) -> tf.Tensor:
    """Return float32 ``[time, keys]``: 0 where a query sees a key, else minus infinity."""
    time = chunk.stop - chunk.start
    seen = tf.linalg.band_part(tf.ones([time, chunk.keys]), -1, chunk.keys - time)
    return tf.math.log(seen)  # comparing and selecting would take ten times as long


def _local(chunk: _Chunk, window: int) -> tf.Tensor:
    """Return the mask of a chunk's queries and keys, float32 ``[time, keys]``, with a window; see ``_causal``."""
    return causal_mask(chunk.start - chunk.first, chunk.stop - chunk.start, chunk.keys - chunk.first, window)


def _of_documents(chunk: _Chunk, starts: tf.Tensor, causal: Mask) -> tf.Tensor:
    """Return the mask of a chunk with ``causal``, where queries see keys of their own document only; see ``_causal``.

    It is ``[rows, 1, time, keys]``. ``starts``: int32 ``[rows, time]``, the position of the first token of every
    position's document.
    """
    keys = tf.range(chunk.first, chunk.keys)
    seen = keys >= starts[:, None, chunk.start : chunk.stop, None]
    return causal(chunk) + tf.math.log(tf.cast(seen, tf.float32))


def _largest(a: Any, b: Any) -> Any:
    """Return the larger of two sizes, an integer if both are."""
    return tf.maximum(a, b) if tf.is_tensor(b) else max(a, b)


def chunk_count(time: int) -> int:
    """Return how many chunks the queries of ``time`` positions are computed in."""
    return 1 if time <= _ONE_CHUNK else min(_MOST_CHUNKS, time // _CHUNK)


def _ends(q: tf.Tensor, longest: int) -> list[Any]:
    """Return 0 and where each chunk ends; ``longest``: the most queries, if their number is open."""
    count = chunk_count(longest if q.shape[2] is None else q.shape[2])
    return [sizes(q)[2] * i // count for i in range(count + 1)]


def _attend(q: tf.Tensor, k: tf.Tensor, v: tf.Tensor, chunks: list[_Chunk], mask: Mask) -> tf.Tensor:
    if len(chunks) == 1:
        return _side_by_side(_ungrouped(tf.matmul(_weights(_scaled(q), k, mask(chunks[0])), v), q))

    @tf.custom_gradient
    def function(q: tf.Tensor, k: tf.Tensor, v: tf.Tensor) -> Any:
        q = _scaled(q)
        output = _output(q, k, v, chunks, mask)

        def backward(gradient: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            of_q, of_k, of_v = _gradients(q, k, v, output, gradient, chunks, mask)
            return _scaled(of_q), tf.cast(of_k, q.dtype), tf.cast(of_v, q.dtype)

        return output, backward

    return function(q, k, v)


def _output(q: tf.Tensor, k: tf.Tensor, v: tf.Tensor, chunks: list[_Chunk], mask: Mask) -> tf.Tensor:
    """Return the attention of scaled queries, chunk by chunk."""
    outputs: list[tf.Tensor] = []
    # Made without a place in the order of chunks, the masks of all layers are one in the optimized graph.
    for chunk, added in [(chunk, mask(chunk)) for chunk in chunks]:
        # One chunk after the other: together, they would take the memory of all weights.
        with tf.control_dependencies(outputs[-1:]):
            queries = q[:, :, chunk.start : chunk.stop]
            weights = _weights(queries, k[:, :, chunk.first : chunk.keys], added)
            outputs.append(_ungrouped(tf.matmul(weights, v[:, :, chunk.first : chunk.keys]), queries))
    return _side_by_side(tf.concat(outputs, 2))


def _gradients(
    q: tf.Tensor,
    k: tf.Tensor,
    v: tf.Tensor,
    output: tf.Tensor,
    gradient: tf.Tensor,
    chunks: list[_Chunk],
    mask: Mask,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Return the gradients of scaled queries, and in float32 of keys and values, from that of the output.

    Keys after the last chunk's have none.
    """
    rows, heads, time, head = sizes(q)
    by_head = [rows, time, heads, head]
    gradient, output = tf.reshape(gradient, by_head), tf.reshape(output, by_head)
    # Of softmax's gradient: the product with the output is that of the weights and their gradient.
    products = tf.reduce_sum(tf.cast(gradient, tf.float32) * tf.cast(output, tf.float32), -1, keepdims=True)
    products, gradient = tf.transpose(products, [0, 2, 1, 3]), tf.transpose(gradient, [0, 2, 1, 3])
    of_q: list[tf.Tensor] = []
    of_k: list[tf.Tensor] = []
    of_v: list[tf.Tensor] = []
    sums: list[tf.Tensor] = []  # gradients of the keys and values that are left
    # From the last chunk on: the sums of keys that the chunk before doesn't see are complete.
    masks = [mask(chunk) for chunk in chunks]
    for chunk, before, added in zip(chunks[::-1], [*chunks[-2::-1], _Chunk(0, 0, 0)], masks[::-1], strict=True):
        with tf.control_dependencies(of_q[-1:] + sums):
            queries = q[:, :, chunk.start : chunk.stop]
            keys, values = k[:, :, chunk.first : chunk.keys], v[:, :, chunk.first : chunk.keys]
            of_output = _grouped(gradient[:, :, chunk.start : chunk.stop], k)
            weights = _weights(queries, keys, added)
            of_weights = tf.cast(tf.matmul(of_output, values, transpose_b=True), tf.float32)
            of_weights -= _grouped(products[:, :, chunk.start : chunk.stop], k)
            of_scores = tf.cast(of_weights * tf.cast(weights, tf.float32), q.dtype)
            of_q.append(_ungrouped(tf.matmul(of_scores, keys), queries))
            factors = (of_scores, _grouped(queries, k)), (weights, of_output)
            more = [_from_first(tf.cast(tf.matmul(a, b, transpose_a=True), tf.float32), chunk) for a, b in factors]
            sums = [a + b for a, b in zip(sums, more, strict=True)] if sums else more
            of_k.append(sums[0][:, :, before.keys :])
            of_v.append(sums[1][:, :, before.keys :])
            sums = [total[:, :, : before.keys] for total in sums]
    whole_q, whole_k, whole_v = (tf.concat(of_chunks[::-1], 2) for of_chunks in (of_q, of_k, of_v))
    return whole_q, whole_k, whole_v


def _from_first(x: tf.Tensor, chunk: _Chunk) -> tf.Tensor:
    """Return ``x`` ``[rows, kv_heads, keys, head]`` of a chunk's keys with zeros for the keys before them."""
    if isinstance(chunk.first, int) and chunk.first == 0:
        return x
    return tf.pad(x, [[0, 0], [0, 0], [chunk.first, 0], [0, 0]])


def _weights(q: tf.Tensor, k: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
    """Return the weights ``[rows, kv_heads, group * time, keys]`` of scaled queries."""
    scores = tf.cast(tf.matmul(_grouped(q, k), k, transpose_b=True), tf.float32)
    if mask is not None:
        by_head = tf.reshape(scores, [*sizes(q)[:3], sizes(k)[2]])
        scores = tf.reshape(by_head + mask, sizes(scores))
    return tf.cast(tf.nn.softmax(scores), q.dtype)


def _grouped(q: tf.Tensor, k: tf.Tensor) -> tf.Tensor:
    """Return ``[rows, heads, time, size]`` as ``[rows, kv_heads, group * time, size]``: one product for a group."""
    rows, heads, time, size = sizes(q)
    return tf.reshape(q, [rows, k.shape[1], heads // k.shape[1] * time, size])


def _ungrouped(x: tf.Tensor, q: tf.Tensor) -> tf.Tensor:
    """Return grouped ``x`` in the shape of the queries ``q``."""
    return tf.reshape(x, sizes(q))


def _side_by_side(x: tf.Tensor) -> tf.Tensor:
    """Return ``[rows, heads, time, head]`` as ``[rows, time, heads * head]``."""
    rows, heads, time, head = sizes(x)
    return tf.reshape(tf.transpose(x, [0, 2, 1, 3]), [rows, time, heads * head])


def _scaled(q: tf.Tensor) -> tf.Tensor:
    return q * q.shape[-1] ** -0.5
