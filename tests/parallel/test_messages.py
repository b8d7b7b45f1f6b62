"""Host-side messages between ranks, and the flight recorder's records of them and of collectives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvdlm.protocols.world import World
from hvdlm_diagnosis.recorder_reader import read_recording


def test_agree_sums_counts_in_the_background(world: World, tensor: Callable[[np.ndarray], Any]) -> None:
    group = world.group(range(world.size))
    for number in range(3):
        handle = world.agree([1, world.rank, number])
        group.all_reduce([tensor(np.ones(4, np.float32))], "between")
        assert handle.wait() == [world.size, sum(range(world.size)), number * world.size]


@pytest.mark.parametrize("length", [0, 1, 1000, 3_000_001])
def test_broadcast_bytes_reaches_all_ranks_from_any_root(world: World, length: int) -> None:
    for root in range(world.size):
        data = np.random.default_rng(root).integers(0, 256, length, np.uint8).tobytes()
        assert world.broadcast_bytes(data if world.rank == root else None, root) == data


def test_broadcast_object_reaches_all_ranks_from_any_root(world: World) -> None:
    for root in range(world.size):
        assert world.broadcast_object({"rank": world.rank, "é": [1.5, None]}, root) == {"rank": root, "é": [1.5, None]}
    assert world.gather_objects("x" * world.rank) == ["x" * rank for rank in range(world.size)]


def test_every_collective_is_recorded_with_its_end(
    world: World, tensor: Callable[[np.ndarray], Any], tmp_path: Path
) -> None:
    world.recorder.keep_in(tmp_path, world.rank)
    group, path = world.group(range(world.size)), tmp_path / f"rank-{world.rank:04d}.recorder"
    before = max((entry.sequence for entry in read_recording(path).entries), default=0)
    handle = group.all_gather_async(tensor(np.ones((2, 3), np.float32)), "kept")
    world.gather_objects(0)
    world.agree([1]).wait()
    handle.wait()
    entries = [entry for entry in read_recording(path).entries if entry.sequence > before]
    assert [entry.operation for entry in entries] == ["all_gather", "gather_objects", "agree"]
    assert all(entry.ended and entry.site.startswith("parallel/test_messages.py:") for entry in entries)
    assert (entries[0].name, entries[0].shape, entries[0].dtype) == ("kept", "[2,3]", "float32")


def test_no_completed_collective_stays_open(world: World, tensor: Callable[[np.ndarray], Any]) -> None:
    """Of this and all earlier tests of this launch; an open one would be taken for a hang."""
    world.group(range(world.size)).all_gather_async(tensor(np.ones(3, np.float32)), "completed").wait()
    world.agree([1]).wait()
    assert not world.recorder.open
