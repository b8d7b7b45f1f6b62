"""The contracts of World and Group on real ranks, for every backend and framework."""

from __future__ import annotations

import time

import numpy as np
import pytest

from hvdlm.communication.traffic import since, snapshot
from hvdlm.config import ParallelConfig
from hvdlm.errors import HvdlmError
from hvdlm.parallel.mesh import make_mesh
from hvdlm.protocols.group import Group
from hvdlm.protocols.world import World
from launching import RANKS


def all_ranks(world: World) -> Group:
    return world.group(range(world.size))


def values(rank: int, count: int = 12, dtype: str = "float32") -> np.ndarray:
    return (np.arange(count) + 100 * rank).astype(dtype)


def test_the_world_has_as_many_ranks_as_were_started(world: World) -> None:
    assert world.size == RANKS
    assert world.gather_objects(world.rank) == list(range(world.size))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int32", "int64"])
def test_all_reduce_sums_over_all_ranks(world: World, tensor, dtype: str) -> None:
    reduced = all_ranks(world).all_reduce_async(tensor(values(world.rank, dtype=dtype)), f"sum.{dtype}").wait()
    expected = sum(values(rank, dtype=dtype) for rank in range(world.size))
    np.testing.assert_array_equal(np.asarray(reduced), expected)


def test_grouped_all_reduce_keeps_order_and_shapes(world: World, tensor) -> None:
    sent = [tensor(values(world.rank, n).reshape(shape)) for n, shape in ((4, (2, 2)), (3, (3,)), (6, (1, 6)))]
    reduced = all_ranks(world).all_reduce(sent, "grouped")
    for n, result, tensor_sent in zip((4, 3, 6), reduced, sent, strict=True):
        expected = sum(values(rank, n) for rank in range(world.size)).reshape(tuple(tensor_sent.shape))
        np.testing.assert_array_equal(np.asarray(result), expected)


def test_all_gather_concatenates_uneven_shards_in_rank_order(world: World, tensor) -> None:
    gathered = all_ranks(world).all_gather(tensor(values(world.rank, world.rank + 1)), "gather")
    expected = np.concatenate([values(rank, rank + 1) for rank in range(world.size)])
    np.testing.assert_array_equal(np.asarray(gathered), expected)


def test_reduce_scatter_gives_each_rank_its_shard_of_the_sum(world: World, tensor) -> None:
    shard = all_ranks(world).reduce_scatter(tensor(values(world.rank)), "scatter")
    expected = np.split(sum(values(rank) for rank in range(world.size)), world.size)[world.rank]
    np.testing.assert_array_equal(np.asarray(shard), expected)


def test_broadcast_gives_the_roots_tensor(world: World, tensor) -> None:
    root = world.size - 1
    received = all_ranks(world).broadcast(tensor(values(world.rank)), root, "broadcast")
    np.testing.assert_array_equal(np.asarray(received), values(root))


def test_all_to_all_exchanges_equal_shards(world: World, tensor) -> None:
    received = all_ranks(world).all_to_all(tensor(values(world.rank)), "all_to_all")
    expected = np.concatenate([np.split(values(rank), world.size)[world.rank] for rank in range(world.size)])
    np.testing.assert_array_equal(np.asarray(received), expected)


def test_a_sum_that_nobody_waited_for_delays_the_next(world: World, tensor) -> None:
    """A training that is given up leaves sums in flight, which end on some ranks before others."""
    group = all_ranks(world)
    first = group.all_reduce_async(tensor(values(world.rank)), "given_up")
    if world.rank == world.size - 1:
        time.sleep(0.1)
    second = group.all_reduce_async(tensor(values(world.rank) + 1.0), "given_up")
    results = [np.asarray(handle.wait()) for handle in (second, first)]
    expected = sum(values(rank) for rank in range(world.size))
    np.testing.assert_array_equal(results[0], expected + world.size)
    np.testing.assert_array_equal(results[1], expected)


def test_barrier_waits_for_the_slowest(world: World) -> None:
    world.gather_objects(0)  # all start together
    started = time.monotonic()
    if world.rank == world.size - 1:
        time.sleep(0.5)
    all_ranks(world).barrier()
    waited = time.monotonic() - started
    assert min(world.gather_objects(waited)) >= 0.4


def test_bytes_and_calls_are_counted(world: World, tensor) -> None:
    group = all_ranks(world)
    before = snapshot(group.traffic)
    group.all_reduce_async(tensor(values(world.rank, 1000)), "counted.first").wait()
    group.all_reduce_async(tensor(values(world.rank, 500)), "counted.second").wait()
    group.all_gather(tensor(values(world.rank, 10)), "fetched")
    moved = since(group.traffic, before)
    assert {key: (entry.calls, entry.bytes) for key, entry in moved.items()} == {
        "counted/all_reduce": (2, 6000),
        "fetched/all_gather": (1, 40),
    }


def test_objects_are_gathered_and_broadcast_whole(world: World) -> None:
    value = {"rank": world.rank, "text": "é" * (world.rank + 1), "figure": 0.1 + world.rank}
    expected = [{"rank": r, "text": "é" * (r + 1), "figure": 0.1 + r} for r in range(world.size)]
    assert world.gather_objects(value) == expected
    assert world.broadcast_object(value, root=1) == expected[1]
    assert world.any(world.rank == 1) is True
    assert world.any(False) is False


def test_groups_along_the_mesh_reduce_among_their_members_only(world: World, tensor) -> None:
    mesh = make_mesh(world.size, ParallelConfig(tensor=2 if world.size == 4 else 1))
    for axis in ("data", "tensor"):
        ranks = mesh.group(axis, world.rank)
        reduced = world.group(ranks).all_reduce_async(tensor(values(world.rank)), f"axis.{axis}").wait()
        np.testing.assert_array_equal(np.asarray(reduced), sum(values(rank) for rank in ranks))


def test_a_group_that_was_not_declared_is_refused(world: World) -> None:
    if world.size < 4:
        with pytest.raises(HvdlmError, match="not a group"):
            world.group((0, 5))
    else:
        with pytest.raises(HvdlmError, match="not a group"):
            world.group((0, 1, 2))
