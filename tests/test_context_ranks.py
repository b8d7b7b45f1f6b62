"""Context ranks: their mesh, the positions that each has, and what is refused or planned with them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from builders import token_batch
from hvdlm.cli import main
from hvdlm.config import Config, ParallelConfig
from hvdlm.errors import HvdlmError
from hvdlm.parallel.mesh import Mesh, fitted, make_mesh
from hvdlm.protocols.types import Batch
from hvdlm_language.context_ranks import ContextRanks, cut_all


class _Group:
    def __init__(self, ranks: tuple[int, ...]) -> None:
        self.ranks = ranks
        self.traffic: dict[str, Any] = {}


def ring(size: int) -> list[ContextRanks]:
    """Return ``size`` context ranks that exchange nothing."""
    everyone: Any = _Group(tuple(range(size)))
    return [ContextRanks(everyone, rank, everyone, everyone) for rank in range(size)]


MESH = Mesh(2, 2, 2, context=4)


def test_every_rank_has_one_place_on_four_axes() -> None:
    places = [tuple(MESH.coordinates(rank)[axis] for axis in MESH.axes) for rank in range(MESH.size)]
    assert MESH.axes == ("data", "pipeline", "context", "tensor") and MESH.shape == (2, 2, 4, 2)
    assert places == list(np.ndindex(*MESH.shape))
    assert MESH.group("tensor", 5) == (4, 5) and MESH.group("context", 5) == (1, 3, 5, 7)


def test_replicas_and_the_ranks_of_a_copy_share_one_rank() -> None:
    for rank in range(MESH.size):
        replicas, copy = MESH.replica_group(rank), MESH.model_group(rank)
        assert len(replicas) == MESH.replicas == 8 and len(copy) == 4
        assert set(replicas) & set(copy) == {rank}
        assert list(replicas) == sorted(replicas) and set(MESH.group("context", rank)) <= set(replicas)
    assert [MESH.rank_of(stage, tensor) for stage in range(2) for tensor in range(2)] == list(MESH.model_group(0))


def test_groups_hold_the_ring_and_the_replicas_once() -> None:
    groups = Mesh(1, 1, 1, context=4).groups()
    assert groups == [(0, 1, 2, 3), (0, 1), (1, 2), (2, 3), (0, 3)]
    assert Mesh(2, 1, 1, context=1).groups() == [(0, 1)]
    assert len(set(MESH.groups())) == len(MESH.groups())


def test_a_mesh_without_context_ranks_is_as_before() -> None:
    mesh = Mesh(2, 3, 2)
    assert mesh.axes == ("data", "pipeline", "tensor") and mesh.shape == (2, 3, 2)
    assert all(mesh.replica_group(rank) == mesh.group("data", rank) for rank in range(mesh.size))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_positions_are_divided_and_batches_follow_them(size: int) -> None:
    batch, ranks = token_batch(1, True, (3, 4 * size)), ring(size)
    owned = [rank.positions(4) for rank in ranks]
    assert sorted(np.concatenate(owned).tolist()) == list(range(4 * size))
    for rank, own in zip(ranks, owned, strict=True):
        cut = rank.cut(batch)
        np.testing.assert_array_equal(cut.inputs, batch.inputs[:, own])
        np.testing.assert_array_equal(cut.targets, batch.targets[:, own])
        assert batch.weights is not None and cut.weights is not None
        np.testing.assert_array_equal(cut.weights, batch.weights[:, own])


def test_rows_that_chunks_do_not_divide_are_padded_uncounted() -> None:
    batch = token_batch(2, False, (2, 10))
    cut = [rank.cut(batch) for rank in ring(4)]
    assert {one.inputs.shape for one in cut} == {(2, 4)}
    assert sum(one.tokens for one in cut) == batch.tokens
    assert cut_all([batch], None) == [batch]


@pytest.mark.parametrize("size", [2, 3, 5])
def test_ranks_compute_all_that_queries_see_and_as_much(size: int) -> None:
    length = 3
    time, work = 2 * length, set()
    for rank in ring(size):
        own, seen = rank.positions(time), np.zeros((time, size * time), bool)
        scores = 0
        for source in ring(size):
            queries, keys = rank.visible(source.index, time)
            of_queries, of_keys = own[queries], source.positions(time)[keys]
            visible = of_queries[:, None] >= of_keys
            # Of another rank's keys each query sees all or none, so that kernels need no mask.
            assert source.index == rank.index or visible.all()
            seen[np.arange(time)[queries][:, None], of_keys] |= visible
            scores += int(visible.sum())
        np.testing.assert_array_equal(seen, own[:, None] >= np.arange(size * time))
        work.add(scores)
    assert len(work) == 1


REFUSED = [
    (["--model.name", "lstm"], "divides the positions of a GPT that is a language model, and not those of model.name"),
    (["--data.context", "36"], "data.context 36 can't be cut into two chunks for each rank of parallel.context 4"),
    (["--model.name", "mistral", "--model.window", "8"], "model.window 8 is shorter than data.context 64"),
    (["--lora.rank", "4"], "lora.rank: adapters are trained by data ranks alone"),
    (["--communication.exchange", "diloco"], "communication.exchange diloco doesn't go with parallel.context 4"),
    (["--communication.reduction", "exact"], "communication.reduction exact doesn't go with parallel.context 4"),
    (["--communication.reduction", "sum"], "set --communication.reduction average"),
    (["--communication.auto", "true"], "communication.auto true doesn't go with parallel.context 4"),
    (["--parallel.data", "2", "--parallel.data_per_node", "2"], "set --parallel.data_per_node 1"),
    (["--train.compile", "true"], "train.compile true doesn't go with parallel.context 4"),
]


@pytest.mark.parametrize("options, message", REFUSED, ids=[" ".join(options) for options, _ in REFUSED])
def test_what_context_ranks_do_not_do_is_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--model.layers", "1", "--model.width", "32", "--model.heads", "2", "--data.context", "64"]
    code = main(["plan", *small, "--parallel.context", "4", *options])
    printed = capsys.readouterr().err.strip()
    assert code == 2 and message in printed and len(printed) < 400 and "\n" not in printed


@pytest.mark.parametrize("switch, code", [("--search", 2), ("--simulate", 2), ("--hardware=h100", 0)])
def test_seconds_of_context_ranks_are_not_predicted(switch: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--hardware", "h100", "--ranks", "8", "--parallel.context", "2", "--data.context", "64"]
    assert main(["plan", *options, switch]) == code
    printed = capsys.readouterr()
    assert "how long context ranks take was not measured (parallel.context)" in (printed.err or printed.out)


def test_the_number_of_ranks_is_a_multiple_of_the_context_ranks() -> None:
    assert make_mesh(8, ParallelConfig(context=2, tensor=2)) == Mesh(2, 1, 2, context=2)
    with pytest.raises(HvdlmError, match=r"1 x 1 x 4 x 1 .* set parallel.context to one of 1, 2, 3, 6\.$"):
        make_mesh(6, ParallelConfig(context=4))
    with pytest.raises(HvdlmError, match="possible: 1x1x2x2, 1x2x2x1, 2x1x2x1"):
        make_mesh(4, ParallelConfig(data=3, context=2))


def test_plans_show_the_activations_and_the_ring_of_a_rank(capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "plan",
        "--model.layers",
        "2",
        "--model.width",
        "64",
        "--data.context",
        "4096",
        "--train.batch_size",
        "8",
    ]
    assert main([*options, "--parallel.context", "4"]) == 0
    text = capsys.readouterr().out
    assert "ranks     4: 1 x 1 x 4 x 1 (data x pipeline x context x tensor)" in text
    assert "context" in text.partition("bytes of a rank's step")[2].splitlines()[0]
    assert Config().parallel.context == 1 and isinstance(token_batch(), Batch)


@pytest.mark.parametrize(
    ("trained", "size", "expected"),
    [
        (ParallelConfig(context=4), 1, ParallelConfig()),
        (ParallelConfig(pipeline=2, virtual_stages=2), 1, ParallelConfig()),
        (ParallelConfig(tensor=4, sequence=True, zero=1), 6, ParallelConfig(zero=1)),
        (ParallelConfig(data=3, tensor=2, sequence=True), 4, ParallelConfig(data=2, tensor=2, sequence=True)),
        (ParallelConfig(data=8, data_per_node=4), 2, ParallelConfig(data=2)),
        (ParallelConfig(pipeline=2, virtual_stages=2), 4, ParallelConfig(data=2, pipeline=2, virtual_stages=2)),
    ],
)
def test_a_trained_layout_is_fitted_to_the_ranks(trained: ParallelConfig, size: int, expected: ParallelConfig) -> None:
    layout = fitted(trained, size)
    assert layout == (replace(expected, data=layout.data) if expected.data is None else expected)
    assert make_mesh(size, layout).size == size
