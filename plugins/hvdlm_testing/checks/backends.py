"""Checks of backends: the world, every collective compared with numpy, and a run to a checkpoint and on from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy
import numpy as np

from hvdlm.errors import HvdlmError
from hvdlm.protocols.backend import Backend
from hvdlm.protocols.group import Done, Group
from hvdlm.protocols.world import World
from hvdlm_backends.host_tensors import host_tensors
from hvdlm_testing.checks.harness import Findings, Harness, lacking
from hvdlm_testing.checks.runs import check_text_run
from hvdlm_testing.plugin_under_test import PluginUnderTest

_SUMMED = ("float32", "float64", "float16", "bfloat16", "int32", "int64")
_MOVED = (*_SUMMED, "int8", "uint8", "int16")
_EXACT = {"bfloat16": 2**7, "float16": 2**10, "float32": 2**23, "float64": 2**40}
_EXACT |= {"int8": 2**6, "uint8": 2**6, "int16": 2**12}
_SIZES = (1, 17, 1000)  # elements of each rank's shard


def check_backend(harness: Harness, plugin: PluginUnderTest, member: str, findings: Findings) -> None:
    """Check the world that the plugin's backend has started."""
    backend = plugin.implementation.hvdlm_make_backend(name=plugin.name)
    for made, contract in ((backend, Backend), (harness.world, World), (harness.group, Group)):
        if missing := lacking(made, contract):
            raise HvdlmError(f"its {contract.__name__.lower()} lacks {missing} of {contract.__module__}.")
    shape = tuple(backend.launch_shape())
    valid = len(shape) == 4 and all(isinstance(n, int) for n in shape)
    valid = valid and shape[0] < shape[1] and shape[2] < shape[3]
    findings.require(
        valid, f"backend {plugin.name}: launch_shape is {shape}, expected (rank, size, local rank, local size)."
    )
    _check_world(harness, shape, findings)
    _check_group(harness, findings)
    if harness.world.size > 1 and _sound(harness, findings):
        _check_order(harness, findings)
        _check_other_groups(harness, findings)
    if _sound(harness, findings):
        check_text_run(harness, "rnn", findings, zero=int(harness.world.size > 1))


def _sound(harness: Harness, findings: Findings) -> bool:
    """Return whether no rank has a fault yet: those that stopped alone would leave the others waiting."""
    return not any(harness.world.gather_objects(len(findings.faults)))


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


def _arrays(harness: Harness, dtype: str, elements: int) -> list[np.ndarray]:
    """Return every rank's array, of values whose sums are exact in ``dtype`` and in none that is smaller."""
    bound = _EXACT.get(dtype, 2**30) // harness.world.size
    random = np.random.default_rng(elements)
    shape = (elements * harness.world.size,)
    return [random.integers(bound // 2, bound, shape).astype(dtype) for _ in range(harness.world.size)]


def _calls(harness: Harness, arrays: list[np.ndarray]) -> Iterator[tuple[str, Callable[[Group, Any], Any], Any]]:
    """Yield the name of every collective, its call and what numpy returns."""
    size, rank, dtype = harness.world.size, harness.world.rank, arrays[0].dtype
    total, split = np.sum(arrays, 0, dtype=dtype), [np.split(array, size) for array in arrays]
    if dtype.name in _SUMMED:
        yield "all_reduce", lambda g, x: g.all_reduce([x], "check.sum")[0], total
        yield "all_reduce_async", lambda g, x: g.all_reduce_async(x, "check.sum_later").wait(), total
        yield "reduce_scatter", lambda g, x: g.reduce_scatter(x, "check.scatter"), np.split(total, size)[rank]
    yield "all_gather", lambda g, x: g.all_gather(x, "check.gather"), np.concatenate(arrays)
    yield "broadcast", lambda g, x: g.broadcast(x, size - 1, "check.broadcast"), arrays[-1]
    yield "all_to_all", lambda g, x: g.all_to_all(x, "check.all_to_all"), np.concatenate([s[rank] for s in split])


def _check_group(harness: Harness, findings: Findings) -> None:
    """Compare all collectives with numpy, for every dtype of the contract, with few elements and with many."""
    label, group = f"group of {harness.base.backend}", harness.group
    for dtype in _MOVED:
        for elements in _SIZES:
            arrays = _arrays(harness, dtype, elements)
            for name, call, expected in _calls(harness, arrays):
                tensor = harness.framework.tensor(arrays[harness.world.rank].copy())
                result = _values(harness, call(group, tensor))
                findings.require(
                    result.dtype == expected.dtype and np.array_equal(result, expected),
                    f"{label}: {name} of {dtype} is {_text(result)}, expected {_text(expected)}"
                    f"{_reason(harness, result, expected, arrays)}.",
                )
        if not _sound(harness, findings):  # the other dtypes would repeat it
            return
    group.barrier()
    _check_traffic(harness, label, findings)


def _values(harness: Harness, tensor: Any) -> np.ndarray:
    """Return a tensor's values; of bfloat16, which numpy can't read, as the framework passes them to backend mpi4py."""
    if "bfloat16" not in str(getattr(tensor, "dtype", "")):
        return np.asarray(tensor)
    read: list[np.ndarray] = []

    def keep(array: np.ndarray, arrived: Callable[[], None] | None) -> Done:
        if arrived is not None:
            arrived()
        read.append(array.copy())
        return Done(array)

    host_tensors(harness.framework).through(tensor, keep, tuple(tensor.shape)).wait()
    return read[0]


def _text(array: np.ndarray) -> str:
    values = ", ".join(str(value) for value in array.reshape(-1)[:4].tolist())
    return f"{array.dtype} {list(array.shape)} [{values}{', ...' if array.size > 4 else ''}]"


def _reason(harness: Harness, result: np.ndarray, expected: np.ndarray, arrays: list[np.ndarray]) -> str:
    """Return what a wrong result is instead, where it is recognised."""
    if result.shape != expected.shape:
        return ""
    if np.allclose(result * len(arrays), expected, rtol=1e-3) and len(arrays) > 1:
        return ": it is the mean of the ranks', and reductions are sums"
    if np.array_equal(np.sort(result), np.sort(expected)):
        return ": it has the same values in another order, and theirs is that of the ranks"
    if np.allclose(result, expected, rtol=1e-3):
        return ": it is rounded"
    return ": it is this rank's own" if np.array_equal(result, arrays[harness.world.rank]) else ""


def _check_traffic(harness: Harness, label: str, findings: Findings) -> None:
    """Check that calls and bytes are counted by purpose and operation; nothing is sent on one rank."""
    if harness.world.size == 1:
        return
    calls = {"all_gather": len(_MOVED), "broadcast": len(_MOVED), "all_to_all": len(_MOVED)}
    calls |= {"all_reduce": 2 * len(_SUMMED), "reduce_scatter": len(_SUMMED)}
    for operation, count in calls.items():
        dtypes = _SUMMED if operation in ("all_reduce", "reduce_scatter") else _MOVED
        elements = harness.world.size * sum(_SIZES) * sum(np.dtype(dtype).itemsize for dtype in dtypes)
        expected = (count * len(_SIZES), elements * count // len(dtypes))
        traffic = harness.group.traffic.get(f"check/{operation}")
        findings.require(
            traffic is not None and (traffic.calls, traffic.bytes) == expected,
            f"{label}: traffic['check/{operation}'] is {traffic}, expected {expected[0]} calls and {expected[1]} bytes "
            "handed over.",
        )


def _check_order(harness: Harness, findings: Findings) -> None:
    """Check collectives in flight together, of which broadcasts start in an order of the rank's own."""
    group, world, tensor = harness.group, harness.world, harness.framework.tensor
    label = f"group of {harness.base.backend}"
    roots = [index % world.size for index in range(4)]
    order = range(4) if world.rank % 2 else range(3, -1, -1)
    values = {index: np.full(3, 10 * index + world.rank, np.float32) for index in order}
    handles = {i: group.broadcast_async(tensor(values[i]), roots[i], f"check.from{i}") for i in order}
    sums = [group.all_reduce_async(tensor(np.full(3, float(i))), f"check.total{i}") for i in range(3)]
    message = world.gather_objects(world.rank)
    received = {index: np.asarray(handles[index].wait()).tolist() for index in range(4)}
    findings.require(
        received == {index: [10.0 * index + roots[index]] * 3 for index in range(4)},
        f"{label}: broadcasts that ranks start in different orders are {received}: match them by name.",
    )
    totals = [np.asarray(handle.wait()).tolist() for handle in reversed(sums)][::-1]
    findings.require(
        totals == [[float(i * world.size)] * 3 for i in range(3)] and message == list(range(world.size)),
        f"{label}: three sums in flight are {totals}, and a message meanwhile {message}: a result is another call's.",
    )
    several = [np.full(n, world.rank + 1, dtype) for n, dtype in ((3, np.float32), (5, np.float32), (2, np.int64))]
    sums = group.all_reduce([tensor(array.copy()) for array in several], "check.several")
    expected_sums = [np.full(len(a), sum(range(1, world.size + 1)), a.dtype) for a in several]
    findings.require(
        all(np.array_equal(np.asarray(a), b) for a, b in zip(sums, expected_sums, strict=True)),
        f"{label}: all_reduce of three tensors is {[_text(np.asarray(a)) for a in sums]}.",
    )
    rows = np.arange(2 * (world.rank + 1), dtype=np.float32).reshape(-1, 2)
    gathered = np.asarray(group.all_gather(tensor(rows), "check.rows"))
    expected = np.concatenate([np.arange(2 * (r + 1), dtype=np.float32).reshape(-1, 2) for r in range(world.size)])
    findings.require(
        np.array_equal(gathered, expected),
        f"{label}: all_gather of ranks with different numbers of rows is {_text(gathered)}, not {_text(expected)}.",
    )


def _check_other_groups(harness: Harness, findings: Findings) -> None:
    """Check that a group of one rank is the identity, and that an unknown one is refused in a sentence."""
    label, rank = f"world of {harness.base.backend}", harness.world.rank
    alone = harness.world.group((rank,)).all_reduce([harness.framework.tensor(np.ones(2, np.float32))], "check.alone")
    findings.require(np.asarray(alone[0]).tolist() == [1, 1], f"{label}: a sum over one rank is {alone[0]}.")
    try:
        harness.world.group((harness.world.size, harness.world.size + 1))
    except HvdlmError:
        return
    except Exception as error:  # a third party's code may raise anything
        findings.fault(f"{label}: group() of unknown ranks raises {type(error).__name__}, expected an HvdlmError.")
        return
    findings.fault(f"{label}: group() returns a group of ranks that don't exist, expected an HvdlmError.")
