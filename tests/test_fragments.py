"""Fragments: they cover the flat vector, and what tensor ranks hold alike belongs to the same fragment on all."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from hvdlm.models.spec import Init, ParamSpec
from hvdlm.parallel.flat_layout import FlatLayout, LocalParam, Shard, make_layout, whole
from hvdlm_compression.fragments import cut_into_fragments

shapes = st.lists(st.lists(st.integers(1, 40), max_size=3).map(tuple), min_size=1, max_size=6)


def params(shapes: list[tuple[int, ...]]) -> list[ParamSpec]:
    return [ParamSpec(f"p{i}", shape, ("a",) * len(shape), Init("zeros")) for i, shape in enumerate(shapes)]


def layout_of_rank(shapes: list[tuple[int, ...]], rank: int, ranks: int) -> FlatLayout:
    """Return the layout of a tensor rank, which holds a share of the rows of every second parameter."""
    local = []
    for index, param in enumerate(params(shapes)):
        shard = whole(param.shape)
        if index % 2 and param.shape and param.shape[0] >= ranks:
            first, last = (param.shape[0] * r // ranks for r in (rank, rank + 1))
            start, extent = (first, *(0,) * (len(param.shape) - 1)), (last - first, *param.shape[1:])
            shard = Shard(param.shape, start, extent)
        local.append(LocalParam(param, shard))
    return make_layout(local, 10**9)


@given(shapes, st.integers(1, 60))
def test_fragments_cover_the_vector(shapes: list[tuple[int, ...]], count: int) -> None:
    layout = make_layout(params(shapes), 10**9)
    cut, numbers = cut_into_fragments(layout, count)
    ranges = [cut.bucket_range(index) for index in range(len(cut.buckets))]
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])] and ranges[-1][1] == layout.size
    assert list(numbers) == sorted(set(numbers)) and numbers[-1] < count
    assert all(math.prod(slot.shape) == slot.stop - slot.start for slot in cut.slots)
    assert len({slot.name for slot in cut.slots}) == len(cut.slots)
    row = max((math.prod(shape[1:]) for shape in shapes), default=1)
    assert all(stop - start <= layout.size / count + row for start, stop in ranges)


@given(shapes, st.integers(1, 60), st.integers(2, 4))
def test_tensor_ranks_cut_what_they_share_alike(shapes: list[tuple[int, ...]], count: int, ranks: int) -> None:
    owners = []
    for rank in range(ranks):
        layout = layout_of_rank(shapes, rank, ranks)
        cut, numbers = cut_into_fragments(layout, count)
        shared = {f"p{index}" for index in range(0, len(shapes), 2)}
        owners.append(
            {
                slot.name: number
                for (first, last), number in zip(cut.buckets, numbers, strict=True)
                for slot in cut.slots[first:last]
                if slot.name.partition("[")[0] in shared
            }
        )
    assert all(one == owners[0] for one in owners)
