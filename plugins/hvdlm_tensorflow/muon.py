"""Muon (Jordan et al. 2024) on a flat vector's matrices, AdamW on its other elements: see ``hvdlm.parallel.muon``.

Every step, each rank orthogonalizes the matrices of which it updates something, those of the same shape together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import numpy as np
import tensorflow as tf

from hvdlm.config import TrainConfig
from hvdlm.parallel.flat_layout import Elements
from hvdlm.parallel.muon import COEFFICIENTS, EPSILON, ITERATIONS, count, scale_of
from hvdlm.parallel.parameter_groups import UpdateRates
from hvdlm.parallel.sharded_state import ShardedState
from hvdlm.protocols.exchange import ShardedExchange
from hvdlm.protocols.group import Group
from hvdlm_tensorflow.optimizers import FlatOptimizer


class _Moved(NamedTuple):
    """The new momentum of matrices, flat, and what it is replaced by in their update, by elements."""

    momentum: tf.Tensor
    directions: list[tf.Tensor]


class Muon:
    """The update of a flat float32 parameter vector ``[size]``, as ``FlatOptimizer``.

    ``tensor``: the tensor ranks, which shard matrices.
    """

    def __init__(
        self, config: TrainConfig, parameter: tf.Variable, rates: UpdateRates, state: ShardedState, tensor: Group
    ) -> None:
        assert state.muon is not None
        self._config, self._layout, self._sharded, self._tensor = config, state.muon, state, tensor
        self._parameter = parameter
        self._rates = rates
        self._momentum = tf.Variable(tf.zeros(count(state.muon.owned)), trainable=False)
        # One value of every gather: TensorFlow leaves out a collective whose result is not used on this rank, even if
        # something depends on it by a control edge, and other ranks would wait for it.
        gathers = (len(state.muon.buckets) if state.muon.zero_size > 1 else 0) + bool(state.muon.sharded)
        self._arrived = tf.Variable(tf.zeros(gathers), trainable=False)
        # A copy of the elements that are no matrices, which the operations of AdamW need in one vector.
        self._others = [*state.muon.short, *state.muon.long]
        self._copy = tf.Variable(tf.zeros(count(self._others)), trainable=False)
        of_others = rates.of(self._others) if self._others else UpdateRates(np.zeros(0, np.float32))
        self._adamw = FlatOptimizer(replace(config, optimizer="adamw"), self._copy, of_others)

    @property
    def state(self) -> dict[str, tf.Variable]:
        """The state by kind: flat float32, of matrices the momentum, of other elements AdamW's moments."""
        return {"momentum": self._momentum, **self._adamw.state}

    def prepare(self, gradient: tf.Tensor) -> _Moved:
        """Return what the update by ``gradient`` ``[size]`` needs of other ranks, in a graph; nothing is changed."""
        factor = self._config.momentum_value
        own = _joined(gradient, self._layout.owned)
        momentum = factor * self._momentum.read_value() + own
        collected: list[tf.Tensor] = []
        whole = self._whole_matrices(own + factor * momentum, collected)
        if collected:
            self._arrived.assign(tf.stack([tensor[0] for tensor in collected]))
        return _Moved(momentum, self._directions(whole))

    def update(self, gradient: tf.Tensor, learning_rate: tf.Tensor, step: tf.Tensor, moved: _Moved) -> None:
        """Apply ``gradient`` ``[size]``, of which ``prepare`` returned ``moved``, as update ``step`` (from 0)."""
        before, new = tf.identity(self._parameter.read_value()), {}
        if self._others:
            self._copy.assign(_joined(before, self._others))
            self._adamw.update(_joined(gradient, self._others), learning_rate, step)
            lengths = [count([elements]) for elements in self._others]
            new = dict(zip([e[1] for e in self._others], tf.split(self._copy.read_value(), lengths), strict=True))
        for elements, direction in zip(self._layout.owned, moved.directions, strict=True):
            start = elements[1]
            scale = 1.0 if self._rates.scales is None else float(self._rates.scales[start])
            decay, old = scale * float(self._rates.decays[start]), before[start : start + count([elements])]
            new[start] = (1.0 - learning_rate * decay) * old - learning_rate * scale * direction
        self._momentum.assign(moved.momentum)
        self._parameter.assign(_replaced(before, new))

    def _directions(self, whole: Mapping[str, tf.Tensor]) -> list[tf.Tensor]:
        """Return what the elements of matrices are moved along, flat, from ``whole`` matrices' momentum, by name."""
        index = self._sharded.model_shard.index
        rows: dict[str, tf.Tensor] = {}
        for matrices in self._layout.alike():
            stacked = tf.stack([whole[matrix.slot.name] for matrix in matrices])
            moved = orthogonalized(stacked) * scale_of(matrices[0].shape)
            if lengths := matrices[0].lengths:
                chunks = tf.split(moved, lengths, 1 + matrices[0].axis)
                moved = chunks[index]
            flat = tf.unstack(tf.reshape(moved, [len(matrices), -1]))
            rows |= zip([matrix.slot.name for matrix in matrices], flat, strict=True)
        return [rows[slot.name][first:last] for slot, _, (first, last) in self._layout.owned]

    def _whole_matrices(self, own: tf.Tensor, collected: list[tf.Tensor]) -> dict[str, tf.Tensor]:
        """Return all matrices' momentum ``[rows, columns]``, by name, gathered where this rank has a shard of them.

        ``own``: that of this rank's elements, flat. ``collected``: gets the results of all collectives.
        """
        local = self._gathered_shards(own, collected)
        if not self._layout.sharded:
            return local
        sharded, ranks = self._layout.sharded, range(len(self._tensor.ranks))
        flat = tf.concat([tf.reshape(local[matrix.slot.name], [-1]) for matrix in sharded], 0)
        sizes = [math.prod(matrix.shape_on(rank)) for rank in ranks for matrix in sharded]
        gathered = tf.reshape(self._tensor.all_gather(flat, "tensor.momentum"), [sum(sizes)])
        collected.append(gathered)
        shards = tf.split(gathered, sizes)
        for number, matrix in enumerate(sharded):
            numbers = [rank * len(sharded) + number for rank in ranks]
            of_ranks = [tf.reshape(shards[n], matrix.shape_on(rank)) for rank, n in zip(ranks, numbers, strict=True)]
            local[matrix.slot.name] = tf.concat(of_ranks, matrix.axis)
        return local

    def _gathered_shards(self, own: tf.Tensor, collected: list[tf.Tensor]) -> dict[str, tf.Tensor]:
        """Return this tensor rank's shard of all matrices' momentum, by name."""
        layout, matrices = self._sharded.layout, self._layout.matrices
        lengths = [count([elements]) for elements in self._layout.owned]
        views = tf.split(own, lengths) if lengths else []  # a shard of ZeRO may have none
        if self._layout.zero_size == 1:
            pairs = zip(matrices, views, strict=True)
            return {matrix.slot.name: tf.reshape(view, matrix.slot.shape) for matrix, view in pairs}
        exchange, ranges = cast(ShardedExchange, self._sharded.exchange), self._sharded.shard_ranges
        starts = [elements[1] for elements in self._layout.owned]
        vector = _replaced(tf.zeros(ranges[-1][1]), dict(zip(starts, views, strict=True)))
        started = {i: exchange.gather_vector(vector[slice(*ranges[i])], i, "momentum") for i in self._layout.buckets}
        buckets = {i: handle.wait() for i, handle in started.items()}
        collected += buckets.values()
        local = {}
        for matrix, index in zip(matrices, self._layout.matrix_buckets, strict=True):
            slot, begin = matrix.slot, layout.bucket_range(index)[0]
            local[slot.name] = tf.reshape(buckets[index][slot.start - begin : slot.stop - begin], slot.shape)
        return local


def orthogonalized(matrices: tf.Tensor) -> tf.Tensor:
    """Return the approximately nearest orthogonal matrices of ``[count, rows, columns]``, float32.

    Newton-Schulz iterations, in bf16 on GPUs, as the singular values need no more than to come near 1.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = tf.linalg.matrix_transpose(matrices) if tall else matrices
    x = x / (tf.norm(x, axis=(1, 2), keepdims=True) + EPSILON)
    if tf.config.get_visible_devices("GPU"):
        x = tf.cast(x, tf.bfloat16)
    for _ in range(ITERATIONS):
        square = tf.matmul(x, x, transpose_b=True)
        x = a * x + tf.matmul(b * square + c * tf.matmul(square, square), x)
    x = tf.cast(x, tf.float32)
    return tf.linalg.matrix_transpose(x) if tall else x


def _joined(vector: tf.Tensor, elements: Sequence[Elements]) -> tf.Tensor:
    """Return some elements of a vector, one after the other."""
    ranges = [(start, start + last - first) for _, start, (first, last) in elements]
    return tf.concat([vector[start:stop] for start, stop in ranges], 0) if ranges else vector[:0]


def _replaced(vector: tf.Tensor, new: Mapping[int, tf.Tensor]) -> tf.Tensor:
    """Return ``vector`` with the elements from ``start`` on replaced, for every ``{start: values}``."""
    chunks: list[tf.Tensor] = []
    end = 0
    for start, values in sorted(new.items(), key=lambda item: item[0]):
        chunks += [vector[end:start], values] if start > end else [values]
        end = start + int(values.shape[0])
    return tf.concat([*chunks, vector[end:]], 0)
