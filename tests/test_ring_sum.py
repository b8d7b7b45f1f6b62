"""Sums around a ring of ranks: what every rank sends, the order of additions, and sums on real ranks."""

from __future__ import annotations

import inspect
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from hvdlm.config import CommunicationConfig, Config
from hvdlm.errors import HvdlmError
from hvdlm_backends import ring_sum
from hvdlm_backends.mpi import MPIBackend
from hvdlm_backends.ring_sum import BYTES, VARIABLE, Schedule, threshold
from launching import launch

ELEMENTS = (0, 1, 2, 3, 5, 64, 1001)


@pytest.mark.parametrize("size", [2, 3, 4, 7])
@pytest.mark.parametrize("segment", [1, 4, 1000])
def test_what_a_rank_sends_is_what_the_next_one_receives(size: int, segment: int) -> None:
    for elements in ELEMENTS:
        schedules = [Schedule(elements, size, rank, segment) for rank in range(size)]
        assert len({(s.slots, s.segments) for s in schedules}) == 1
        for rank, schedule in enumerate(schedules):
            following = schedules[(rank + 1) % size]
            assert schedule.slots == 2 * (size - 1) * schedule.segments
            for slot in range(schedule.slots):
                assert schedule.sent(slot) == following.received(slot)
                if slot >= schedule.segments:  # it has been received a step before
                    assert schedule.sent(slot) == schedule.received(slot - schedule.segments)


@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_every_rank_sends_the_least_that_a_sum_needs(size: int) -> None:
    """2 (n - 1) / n of the elements, and every element is received once in the second half or already complete."""
    elements = 420 * 7
    for rank in range(size):
        schedule = Schedule(elements, size, rank, 16)
        sent = sum(stop - first for first, stop in map(schedule.sent, range(schedule.slots)))
        assert sent == 2 * (size - 1) * elements // size
        gathered = sorted(map(schedule.received, range(schedule.reducing, schedule.slots)))
        own = (rank + 1) % size  # the chunk whose sum this rank completes
        covered = np.zeros(elements, int)
        for first, stop in gathered:
            covered[first:stop] += 1
        covered[elements * own // size : elements * (own + 1) // size] += 1
        assert (covered == 1).all()


def test_the_threshold_is_the_options_else_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert threshold(None, True) == BYTES and threshold(None, False) == 0
    assert threshold(1000, False) == 1000 and threshold(0, True) == 0
    monkeypatch.setenv(VARIABLE, "4096")
    assert threshold(None, False) == threshold(None, True) == 4096 and threshold(0, True) == 0
    monkeypatch.setenv(VARIABLE, "4k")
    with pytest.raises(HvdlmError, match=f"{VARIABLE} is 4k, expected a number of bytes"):
        threshold(None, True)
    with pytest.raises(HvdlmError, match=f"{VARIABLE} is 4k"):
        MPIBackend().prepare(Config())


@pytest.mark.parametrize("local_size, expected", [("2", None), ("1", "0")])
def test_horovod_fuses_nothing_between_hosts(
    local_size: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    others = {name: value for name, value in os.environ.items() if name != "HOROVOD_FUSION_THRESHOLD"}
    ranks["OMPI_COMM_WORLD_LOCAL_SIZE"] = local_size
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", others | ranks)
        MPIBackend().prepare(Config())
        assert os.environ.get("HOROVOD_FUSION_THRESHOLD") == expected
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", others | ranks)
        MPIBackend().prepare(Config(communication=CommunicationConfig(fusion_bytes=1_000_000)))
        assert os.environ["HOROVOD_FUSION_THRESHOLD"] == "1000000"


def in_the_rings_order(vectors: list[np.ndarray]) -> np.ndarray:
    """Return the sum of the ranks' vectors: chunk c is added from rank c on; 16-bit floats in float32."""
    size, total = len(vectors), np.empty_like(vectors[0])
    wide = np.float32 if total.dtype.itemsize == 2 else total.dtype
    for chunk in range(size):
        first, stop = len(total) * chunk // size, len(total) * (chunk + 1) // size
        summed = vectors[chunk][first:stop]
        for number in range(1, size):
            added = summed.astype(wide) + vectors[(chunk + number) % size][first:stop].astype(wide)
            summed = added.astype(total.dtype)
        total[first:stop] = summed
    return total


def random_vectors(dtype: str, elements: int, size: int) -> list[np.ndarray]:
    """Return a vector for each rank."""
    kind = np.dtype(getattr(ml_dtypes, dtype)) if dtype == "bfloat16" else np.dtype(dtype)
    vectors = []
    for rank in range(size):
        generator = np.random.default_rng([rank, elements])
        vectors.append((1000 * generator.standard_normal(elements)).astype(kind))
    return vectors


ON_RANKS = f"""
import sys
import ml_dtypes
import numpy as np
from mpi4py import MPI
from hvdlm_backends.mpi_collectives import all_reduce, on_several_hosts
from hvdlm_backends.ring_sum import ring_sum

{inspect.getsource(in_the_rings_order)}
{inspect.getsource(random_vectors)}

world = MPI.COMM_WORLD
rank, size = world.Get_rank(), world.Get_size()
assert not on_several_hosts(world)
sums = 0
for dtype in ("float32", "float64", "float16", "bfloat16", "int32", "int64", "complex64", "uint8"):
    for elements, segment in ((0, 64), (1, 64), (2, 64), (3, 64), (7, 1), (1001, 64), (20_011, 256)):
        vectors = random_vectors(dtype, elements, size)
        expected, own = in_the_rings_order(vectors), vectors[rank].copy()
        total = np.empty_like(own)
        ring_sum(own, total, world, segment)
        assert own.tobytes() == vectors[rank].tobytes(), (dtype, elements)
        assert total.tobytes() == expected.tobytes(), (dtype, elements)
        ring_sum(own, own, world, segment)
        assert own.tobytes() == expected.tobytes(), (dtype, elements, "in place")
        sums += 2
large = random_vectors("float32", 3_000_001, size)
expected = in_the_rings_order(large)
for in_place in (False, True):
    total = all_reduce(large[rank].reshape(1, -1), in_place, world, ring=True)
    assert total.shape == (1, 3_000_001) and total.tobytes() == expected.tobytes(), in_place
sys.stdout.write(f"sums that are equal: {{sums + 2}}\\n")
"""


class OneRank:
    """A communicator of one member, which sends nothing."""

    def Get_size(self) -> int:
        return 1

    def Get_rank(self) -> int:
        return 0


def test_one_rank_keeps_its_array() -> None:
    own, total = np.arange(5.0), np.empty(5)
    ring_sum.ring_sum(own, total, OneRank())
    assert (total == own).all()


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_sums_on_ranks_are_numpys_in_the_documented_order(ranks: int, tmp_path: Path) -> None:
    script = tmp_path / "sums.py"
    script.write_text(ON_RANKS)
    done = launch("mpirun", ranks, [str(script)], timeout=120)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("sums that are equal: 114") == ranks, done.stdout
