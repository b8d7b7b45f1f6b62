"""Collectives on 16-bit floats, which every backend sends as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from hvdlm.communication.traffic import since, snapshot
from hvdlm.protocols.world import World
from launching import FRAMEWORK

KINDS = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
both_kinds = pytest.mark.parametrize("dtype", KINDS)


@pytest.fixture
def half(tensor: Callable[[np.ndarray], Any]) -> Any:
    """Return a function that makes a 16-bit tensor of float32 values, and one that returns a tensor's values."""
    if FRAMEWORK == "torch":
        import torch

        return lambda values, dtype: tensor(values).to(getattr(torch, dtype)), lambda t: t.float().numpy()
    if FRAMEWORK == "tensorflow":
        import tensorflow as tf

        return lambda values, dtype: tf.cast(values, dtype), lambda t: tf.cast(t, tf.float32).numpy()
    return lambda values, dtype: tensor(values.astype(dtype)), lambda t: np.asarray(t).astype(np.float32)


def distance(result: np.ndarray, exact: np.ndarray, kind: np.dtype) -> int:
    """Return how many 16-bit floats apart the positive values ``result`` and the rounded ``exact`` are at most."""
    bits = [values.astype(np.float32).astype(kind).view(np.int16).astype(int) for values in (result, exact)]
    return int(np.abs(bits[0] - bits[1]).max())


@both_kinds
def test_half_precision_sums_round_once_per_rank_added(world: World, half: Any, dtype: str) -> None:
    """A sum over n ranks has n - 1 roundings, each of half a unit; the first is that of the exact sum."""
    (make, values), kind, group = half, KINDS[dtype], world.group(range(world.size))
    random = [np.random.default_rng(rank).uniform(0.5, 3.0, 600 * world.size) for rank in range(world.size)]
    vectors = [vector.astype(np.float32).astype(kind).astype(np.float32) for vector in random]
    exact, before = np.sum(np.array(vectors, np.float64), 0), snapshot(group.traffic)
    total = values(group.all_reduce_async(make(vectors[world.rank], dtype), f"half.{dtype}").wait())
    together = group.all_reduce([make(v, dtype) for v in np.split(vectors[world.rank], 2)], f"half.both.{dtype}")
    shard = values(group.reduce_scatter(make(vectors[world.rank], dtype), f"half.shard.{dtype}"))
    counted = since(group.traffic, before)
    assert [counted[f"half/{name}"].bytes for name in ("all_reduce", "reduce_scatter")] == [
        2 * 2 * len(exact),
        2 * len(exact),
    ]
    for result, expected in (
        (total, exact),
        (np.concatenate([values(t) for t in together]), exact),
        (shard, np.split(exact, world.size)[world.rank]),
    ):
        assert result.shape == expected.shape and distance(result, expected, kind) <= world.size - 2


@both_kinds
def test_half_precision_sums_keep_infinities_and_nans(world: World, half: Any, dtype: str) -> None:
    (make, values), group = half, world.group(range(world.size))
    odd = np.tile(np.array([np.inf, -np.inf, np.nan, 2.0], np.float32), 5000)
    sent = make(odd if world.rank == 0 else np.ones_like(odd), dtype)
    total = values(group.all_reduce_async(sent, f"odd.{dtype}").wait())
    np.testing.assert_array_equal(total.reshape(-1, 4), [[np.inf, -np.inf, np.nan, world.size + 1]] * 5000)


@both_kinds
def test_half_precision_is_moved_unchanged(world: World, half: Any, dtype: str) -> None:
    (make, values), group, last = half, world.group(range(world.size)), world.size - 1
    own = (np.arange(8 * world.size) + 64 * world.rank).astype(np.float32)
    everything = np.add.outer(64 * np.arange(world.size), np.arange(8 * world.size)).tolist()  # of every rank
    whole = np.concatenate(everything).tolist()
    chunks = np.array(everything)[:, 8 * world.rank : 8 * world.rank + 8].reshape(-1).tolist()
    sent = make(own, dtype)
    assert values(group.all_gather(sent, f"gather.{dtype}")).tolist() == whole
    assert values(group.all_to_all(sent, f"chunks.{dtype}")).tolist() == chunks
    assert values(group.broadcast(sent, last, f"from.{dtype}")).tolist() == everything[last]
    assert values(group.broadcast_async(sent, 0, f"later.{dtype}").wait()).tolist() == everything[0]
