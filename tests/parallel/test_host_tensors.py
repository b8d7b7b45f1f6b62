"""Backend mpi4py's own features: background transfers, checked names; other backends skip them."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from hvdlm.errors import RankError
from hvdlm.protocols.world import World


@pytest.fixture(autouse=True)
def _only_mpi4py(world: World) -> None:
    if world.transport != "mpi4py":
        pytest.skip(f"transport {world.transport} checks no names")


def test_large_all_reduces_overlap_with_computation(world: World, tensor) -> None:
    group, array = world.group(range(world.size)), np.ones(4_000_000, np.float32)
    handle = group.all_reduce_async(tensor(array), "background")
    deadline = time.monotonic() + 60
    before = world.transfer_seconds()
    while world.transfer_seconds() == before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert world.transfer_seconds() > before
    np.testing.assert_array_equal(np.asarray(handle.wait()), np.full(array.shape, world.size, np.float32))


def test_waiting_for_another_rank_uses_no_core(world: World, tensor) -> None:
    """A started all-reduce uses no core time until all ranks are ready."""
    group = world.group(range(world.size))
    group.barrier()
    if world.rank == world.size - 1:
        time.sleep(1.0)
        group.all_reduce_async(tensor(np.ones(4, np.float32)), "late").wait()
        return
    handle = group.all_reduce_async(tensor(np.ones(4, np.float32)), "late")
    began = time.process_time()
    time.sleep(0.8)
    used = time.process_time() - began
    handle.wait()
    assert used < 0.4, f"{used:.2f} s of core time in 0.8 s"


def test_mismatched_collectives_raise_an_error_on_all_ranks(world: World, tensor) -> None:
    group = world.group(range(world.size))
    name = f"rank.{min(world.rank, 1)}"
    for call in (lambda t: group.all_reduce_async(t, name).wait(), lambda t: group.all_gather(t, name)):
        with pytest.raises(RankError, match=r"rank 0: all_\w+ rank\.0 float32.*rank 1: all_\w+ rank\.1 float32"):
            call(tensor(np.ones(4, np.float32)))
    shape = (4 + min(world.rank, 1),)
    with pytest.raises(
        RankError, match=r"rank 0: all_reduce shapes float32\[4\].*rank 1: all_reduce shapes float32\[5\]"
    ):
        group.all_reduce_async(tensor(np.ones(shape, np.float32)), "shapes").wait()
    total = group.all_reduce_async(tensor(np.ones(4, np.float32)), "afterwards").wait()
    assert np.asarray(total).tolist() == [world.size] * 4


def test_reduce_scatter_takes_uneven_and_empty_tensors(world: World, tensor) -> None:
    group, size = world.group(range(world.size)), world.size
    rows = 2 * size + 1
    values = np.arange(3 * rows, dtype=np.float32).reshape(rows, 3)
    shard = np.asarray(group.reduce_scatter(tensor(values), "uneven"))
    first = 2 * world.rank + min(world.rank, 1)
    np.testing.assert_array_equal(shard, size * values[first : first + 2 + (world.rank == 0)])
    empty = group.all_reduce_async(tensor(np.ones(0, np.float32)), "empty").wait()
    assert np.asarray(empty).shape == (0,)
    rows_of_rank = np.ones((world.rank, 2), np.float32)  # rank 0 has none
    assert np.asarray(group.all_gather(tensor(rows_of_rank), "some")).shape == (sum(range(size)), 2)


def test_asynchronous_broadcasts_are_matched_by_name(world: World, tensor) -> None:
    """Pipeline stages start broadcasts in different orders."""
    group, last = world.group(range(world.size)), world.size - 1
    names = [f"named.{number}" for number in range(4)]
    handles = {}
    for name in names if world.rank else reversed(names):
        handles[name] = group.broadcast_async(tensor(np.full(5, ord(name[-1]) + world.rank, np.float32)), last, name)
    for name in names:
        assert np.asarray(handles[name].wait()).tolist() == [ord(name[-1]) + last] * 5
    handle = group.broadcast_async(tensor(np.ones(4 if world.rank == last else 6, np.float32)), last, "shapes")
    if world.rank == last:
        handle.wait()
        return
    with pytest.raises(RankError, match=r"broadcast shapes float32.*expected 24 bytes, received 16"):
        handle.wait()


def test_each_lane_has_at_most_one_daemon_thread(world: World, tensor) -> None:
    group = world.group(range(world.size))
    for handle in [group.all_reduce_async(tensor(np.ones(4, np.float32)), f"lane.{n}") for n in range(3)]:
        handle.wait()
    lanes = [thread for thread in threading.enumerate() if thread.name.startswith("hvdlm-lane")]
    assert lanes and len(lanes) == len({thread.name for thread in lanes})
    assert all(thread.daemon for thread in lanes)
