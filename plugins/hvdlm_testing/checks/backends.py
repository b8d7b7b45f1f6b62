"""Backends: the world, and every collective against its sum in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hvdlm_testing.checks.harness import Checked, Stage
from hvdlm_testing.launcher import Found
from hvdlm_testing.plugin_under_test import Subject

from hvdlm.errors import HvdlmError
from hvdlm.protocols.group import Group


def check_backend(subject: Subject, framework: str) -> Found:
    """Check the backend that has the plugin's name, as far as it starts here."""
    backend = subject.plugin.hvdlm_make_backend(name=subject.name)
    checked = Checked()
    try:
        shape = tuple(backend.launch_shape())
        good = (
            len(shape) == 4 and all(isinstance(n, int) for n in shape) and shape[0] < shape[1] and shape[2] < shape[3]
        )
        checked.require(
            good, f"backend {subject.name}: launch_shape is {shape}, expected (rank, size, local rank, size)."
        )
        with Stage.open(framework, subject.name, []) as stage:
            _check_world(stage, shape, checked)
            _check_group(stage, checked)
            everyone = stage.world.gather_objects(checked.faults)
    except HvdlmError as error:
        return Found(checked.faults, f"backend {subject.name} does not start here: {error}")
    return Found(list(dict.fromkeys(fault for faults in everyone for fault in faults)))


def _check_world(stage: Stage, shape: tuple[int, ...], checked: Checked) -> None:
    world, what = stage.world, f"world of {stage.base.backend}"
    told = (world.rank, world.size, world.local_rank, world.local_size)
    checked.require(told == shape, f"{what}: ranks are {told}, launch_shape says {shape}.")
    checked.require(isinstance(world.transport, str), f"{what}: transport is no text.")
    ranks = list(range(world.size))
    said = {"rank": world.rank, "text": "é" * world.rank, "figure": 0.1}
    expected = [{"rank": rank, "text": "é" * rank, "figure": 0.1} for rank in ranks]
    last = ranks[-1]
    checked.require(
        world.gather_objects(said) == expected, f"{what}: gather_objects is not every rank's, in their order."
    )
    checked.require(world.broadcast_object(said, last) == expected[-1], f"{what}: broadcast_object is not the root's.")
    checked.require(world.any(world.rank == last) is True and world.any(False) is False, f"{what}: any() is wrong.")
    agreed = world.agree([1, world.rank]).wait()
    checked.require(list(agreed) == [world.size, sum(ranks)], f"{what}: agree() does not add up: {agreed}.")
    sent = b"bytes" if world.rank == last else None
    checked.require(world.broadcast_bytes(sent, last) == b"bytes", f"{what}: broadcast_bytes is not the root's.")
    seconds = world.transfer_seconds()
    checked.require(seconds is None or seconds >= 0, f"{what}: transfer_seconds is {seconds}.")


def _check_group(stage: Stage, checked: Checked) -> None:
    group, size, rank = stage.group, stage.world.size, stage.world.rank
    parts = [(np.arange(4 * size) + 100 * r).astype(np.float32) for r in range(size)]
    total, split = sum(parts), [np.split(part, size) for part in parts]
    made = stage.framework.tensor
    calls: dict[str, tuple[Callable[[Group, Any], Any], np.ndarray]] = {
        "all_reduce": (lambda g, x: g.all_reduce([x], "check.sum")[0], np.asarray(total)),
        "all_reduce_async": (lambda g, x: g.all_reduce_async(x, "check.sum_later").wait(), np.asarray(total)),
        "all_gather": (lambda g, x: g.all_gather(x, "check.gather"), np.concatenate(parts)),
        "reduce_scatter": (lambda g, x: g.reduce_scatter(x, "check.scatter"), np.split(np.asarray(total), size)[rank]),
        "broadcast": (lambda g, x: g.broadcast(x, size - 1, "check.broadcast"), parts[-1]),
        "all_to_all": (lambda g, x: g.all_to_all(x, "check.all_to_all"), np.concatenate([s[rank] for s in split])),
    }
    for name, (call, expected) in calls.items():
        found = np.asarray(call(group, made(parts[rank].copy())))
        checked.require(
            np.array_equal(found, expected),
            f"group of {stage.base.backend}: {name} is {found.tolist()}, expected {expected.tolist()}.",
        )
    group.barrier()
    if size > 1:
        counted = group.traffic.get("check/all_gather")
        good = counted is not None and (counted.calls, counted.bytes) == (1, parts[0].nbytes)
        checked.require(good, f"group of {stage.base.backend}: traffic of check/all_gather is {counted}.")
