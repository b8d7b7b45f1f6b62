"""Checks of backends: the world, and every collective compared with numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hvdlm.errors import HvdlmError
from hvdlm.protocols.group import Group
from hvdlm_testing.checks.harness import Findings, Harness
from hvdlm_testing.launcher import Result
from hvdlm_testing.plugin_under_test import PluginUnderTest


def check_backend(plugin: PluginUnderTest, framework: str) -> Result:
    """Check the backend that has the plugin's name, if it starts on this machine."""
    backend = plugin.implementation.hvdlm_make_backend(name=plugin.name)
    findings = Findings()
    try:
        shape = tuple(backend.launch_shape())
        valid = len(shape) == 4 and all(isinstance(n, int) for n in shape)
        valid = valid and shape[0] < shape[1] and shape[2] < shape[3]
        findings.require(
            valid, f"backend {plugin.name}: launch_shape is {shape}, expected (rank, size, local rank, size)."
        )
        with Harness.open(framework, plugin.name, []) as harness:
            _check_world(harness, shape, findings)
            _check_group(harness, findings)
            of_ranks = harness.world.gather_objects(findings.faults)
    except HvdlmError as error:
        return Result(findings.faults, f"backend {plugin.name} does not start here: {error}")
    return Result(list(dict.fromkeys(fault for faults in of_ranks for fault in faults)))


def _check_world(harness: Harness, shape: tuple[int, ...], findings: Findings) -> None:
    world, label = harness.world, f"world of {harness.base.backend}"
    ranks_and_sizes = (world.rank, world.size, world.local_rank, world.local_size)
    findings.require(
        ranks_and_sizes == shape, f"{label}: ranks and sizes are {ranks_and_sizes}, launch_shape returns {shape}."
    )
    findings.require(isinstance(world.transport, str), f"{label}: transport is not a string.")
    ranks = list(range(world.size))
    message = {"rank": world.rank, "text": "é" * world.rank, "figure": 0.1}
    expected = [{"rank": rank, "text": "é" * rank, "figure": 0.1} for rank in ranks]
    last = ranks[-1]
    findings.require(
        world.gather_objects(message) == expected,
        f"{label}: gather_objects doesn't return every rank's object, in the order of ranks.",
    )
    findings.require(
        world.broadcast_object(message, last) == expected[-1],
        f"{label}: broadcast_object doesn't return the root's object.",
    )
    findings.require(
        world.any(world.rank == last) is True and world.any(False) is False, f"{label}: any() returns a wrong value."
    )
    sums = world.agree([1, world.rank]).wait()
    findings.require(
        list(sums) == [world.size, sum(ranks)], f"{label}: agree() returns {sums}, expected the sums over ranks."
    )
    payload = b"bytes" if world.rank == last else None
    findings.require(
        world.broadcast_bytes(payload, last) == b"bytes", f"{label}: broadcast_bytes doesn't return the root's bytes."
    )
    seconds = world.transfer_seconds()
    findings.require(seconds is None or seconds >= 0, f"{label}: transfer_seconds is {seconds}.")


def _check_group(harness: Harness, findings: Findings) -> None:
    group, size, rank = harness.group, harness.world.size, harness.world.rank
    arrays = [(np.arange(4 * size) + 100 * r).astype(np.float32) for r in range(size)]
    total, split = sum(arrays), [np.split(array, size) for array in arrays]
    tensor = harness.framework.tensor
    calls: dict[str, tuple[Callable[[Group, Any], Any], np.ndarray]] = {
        "all_reduce": (lambda g, x: g.all_reduce([x], "check.sum")[0], np.asarray(total)),
        "all_reduce_async": (lambda g, x: g.all_reduce_async(x, "check.sum_later").wait(), np.asarray(total)),
        "all_gather": (lambda g, x: g.all_gather(x, "check.gather"), np.concatenate(arrays)),
        "reduce_scatter": (lambda g, x: g.reduce_scatter(x, "check.scatter"), np.split(np.asarray(total), size)[rank]),
        "broadcast": (lambda g, x: g.broadcast(x, size - 1, "check.broadcast"), arrays[-1]),
        "all_to_all": (lambda g, x: g.all_to_all(x, "check.all_to_all"), np.concatenate([s[rank] for s in split])),
    }
    for name, (call, expected) in calls.items():
        result = np.asarray(call(group, tensor(arrays[rank].copy())))
        findings.require(
            np.array_equal(result, expected),
            f"group of {harness.base.backend}: {name} is {result.tolist()}, expected {expected.tolist()}.",
        )
    group.barrier()
    if size > 1:
        traffic = group.traffic.get("check/all_gather")
        correct = traffic is not None and (traffic.calls, traffic.bytes) == (1, arrays[0].nbytes)
        findings.require(correct, f"group of {harness.base.backend}: traffic of check/all_gather is {traffic}.")
