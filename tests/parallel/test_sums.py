"""Sums of large tensors: equal on all ranks, and around a ring (HOROVOD_RING_THRESHOLD) in its order of additions."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os

import numpy as np
import pytest

from builders import case
from hvdlm.protocols.world import World
from launching import BACKEND

RING = os.environ.get("HOROVOD_RING_THRESHOLD", "0") != "0" and BACKEND in ("mpi", "mpi4py")


def in_the_rings_order(vectors: list[np.ndarray]) -> np.ndarray:
    """Return the sum of the ranks' vectors: chunk c of n is added from rank c on; float16 in float32."""
    total, wide = np.empty_like(vectors[0]), np.float32 if vectors[0].dtype == np.float16 else vectors[0].dtype
    bounds = [len(total) * chunk // len(vectors) for chunk in range(len(vectors) + 1)]
    for chunk, (first, stop) in enumerate(itertools.pairwise(bounds)):
        summed = vectors[chunk][first:stop]
        for vector in vectors[chunk + 1 :] + vectors[:chunk]:
            summed = (summed.astype(wide) + vector[first:stop].astype(wide)).astype(total.dtype)
        total[first:stop] = summed
    return total


@functools.cache
def magnitudes(elements: int) -> np.ndarray:
    """Return many magnitudes, float64 ``[elements]``, with zeros: exponents are coded by how frequent they are."""
    scales = 10.0 ** np.random.default_rng(elements).uniform(-7, 2, elements)
    scales[::5] = 0.0
    return scales


@functools.cache
def numbers(rank: int, elements: int) -> np.ndarray:
    """Return a rank's vector, float64 ``[elements]``, for all dtypes: two million numbers take a while to draw."""
    return magnitudes(elements) * np.random.default_rng([rank, elements]).standard_normal(elements)


IN_THREADS = "processes, whose transports send large tensors in several messages: threads add arrays of one memory"
LARGEST = case(1_700_001, covered_by=IN_THREADS if BACKEND == "threads" else "")


@pytest.mark.parametrize("elements", [1, 7, 40_001, LARGEST])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64"])
def test_large_sums_are_equal_on_all_ranks(world: World, tensor, dtype: str, elements: int) -> None:
    vectors = [numbers(rank, elements).astype(dtype) for rank in range(world.size)]
    group = world.group(range(world.size))
    total = np.asarray(group.all_reduce_async(tensor(vectors[world.rank].copy()), f"large.{dtype}.{elements}").wait())
    assert len(set(world.gather_objects(hashlib.sha256(total.tobytes()).hexdigest()))) == 1
    if RING:
        np.testing.assert_array_equal(total, in_the_rings_order(vectors))
    tolerance = {"float32": 2e-4, "float64": 1e-12, "float16": 2.0, "int64": 0}[dtype]
    np.testing.assert_allclose(total, np.sum(np.array(vectors, np.float64), 0), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_sums_of_mostly_infinite_numbers_keep_the_signs_of_all(world: World, tensor, dtype: str) -> None:
    odd = np.tile(np.array([np.inf, -np.inf, np.nan, 2.0], dtype), 10_000)
    group = world.group(range(world.size))
    sent = odd if world.rank == 0 else np.ones_like(odd)
    total = np.asarray(group.all_reduce_async(tensor(sent), f"odd.{dtype}").wait())
    np.testing.assert_array_equal(total.reshape(-1, 4), [[np.inf, -np.inf, np.nan, world.size + 1]] * 10_000)
