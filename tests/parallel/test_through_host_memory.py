"""Horovod's collectives on tensors of a device, copied to host memory and back, as where ranks share a GPU."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

from hvdlm.protocols.world import World
from hvdlm_backends.groups import HorovodGroup
from launching import FRAMEWORK


@pytest.fixture
def group(world: World) -> HorovodGroup:
    """Return the group of all ranks, whose tensors travel through host memory."""
    if world.transport not in ("mpi", "gloo"):
        pytest.skip(f"transport {world.transport} always sends from host memory")
    hvd = importlib.import_module(f"horovod.{FRAMEWORK}")
    operations = importlib.import_module(f"hvdlm_{FRAMEWORK}.horovod").Operations(hvd, True)
    return HorovodGroup(operations, range(world.size), hvd.global_process_set)


@pytest.fixture
def on_device() -> Any:
    """Return a function from numpy to a tensor of a device whose memory Horovod can't read (TensorFlow: of the CPU)."""
    if FRAMEWORK == "tensorflow":
        return importlib.import_module("tensorflow").constant
    torch, backend = importlib.import_module("torch"), importlib.import_module("torch._lazy.ts_backend")
    backend.init()
    return lambda array: torch.from_numpy(array).to("lazy")


def values(tensor: Any) -> list[float]:
    return np.asarray(tensor.cpu() if hasattr(tensor, "cpu") else tensor).tolist()


def test_tensors_of_a_device_travel_through_host_memory(world: World, group: HorovodGroup, on_device: Any) -> None:
    size, last = world.size, world.size - 1
    own = np.arange(size, dtype=np.float32) + 10 * world.rank
    everything = [(np.arange(size) + 10 * rank).tolist() for rank in range(size)]
    sums = np.sum(everything, 0).tolist()
    sent = on_device(own.copy())
    total = group.all_reduce_async(sent, "host.sum").wait()
    assert values(total) == sums and getattr(total, "device", "") == getattr(sent, "device", "")
    if FRAMEWORK == "torch":
        assert values(sent) == sums  # sums are computed in place, also where they travel as copies
    both = group.all_reduce([on_device(own.copy()), on_device(2 * own)], "host.both")
    assert [values(t) for t in both] == [sums, [2 * value for value in sums]]
    sent = on_device(own)
    assert values(group.reduce_scatter(sent, "host.shard")) == [sums[world.rank]]
    assert values(group.all_gather(sent, "host.gather")) == np.concatenate(everything).tolist()
    assert values(group.all_to_all(sent, "host.chunks")) == [vector[world.rank] for vector in everything]
    assert values(group.broadcast(sent, last, "host.from")) == everything[last]
    assert values(group.broadcast_async(sent, 0, "host.later").wait()) == everything[0]
    assert values(sent) == own.tolist()


@pytest.mark.skipif(
    FRAMEWORK != "tensorflow", reason="a graph's operations have devices, on which TensorFlow has inputs"
)
def test_graphs_place_the_collectives_on_the_cpu(world: World, group: HorovodGroup) -> None:
    tf = importlib.import_module("tensorflow")
    function = tf.function(lambda x: group.all_reduce_async(x, "host.placed").wait(), autograph=False)
    graph = function.get_concrete_function(tf.zeros(4)).graph
    devices = {op.device for op in graph.get_operations() if op.type.startswith("Horovod")}
    assert devices == {"/device:CPU:0"}
