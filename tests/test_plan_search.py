"""plan --search: the layouts it lists are valid, fit, and are the fastest by the prediction."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from builders import configured_spec, small_config
from hvdlm.config import Config
from hvdlm.parallel.mesh import Mesh
from hvdlm.planning.search import Layout, Space, make_space, search, value_of, with_options
from hvdlm.planning.search_reasons import gains, too_large


class InventedCosts:
    """Costs drawn at random by the layout's options, with a lower bound that is right."""

    def __init__(self, seed: int, memory: float = 0.6) -> None:
        self.seed = seed
        self.memory = memory
        self.times = 0

    def _draw(self, purpose: str, *values: Any) -> float:
        return random.Random(f"{self.seed} {purpose} {values}").random()

    def _layout(self, config: Config, mesh: Mesh) -> tuple[Any, ...]:
        p, train = config.parallel, config.train  # one rank alone has nothing to shard
        return (*mesh.shape, p.sequence, p.zero if mesh.data > 1 else 0, train.micro_batch_size)

    def valid(self, config: Config, mesh: Mesh) -> bool:
        zero, sequence = config.parallel.zero if mesh.data > 1 else 0, config.parallel.sequence
        lossy = config.communication.exchange != "all_reduce"
        drawn = self._draw("valid", *self._layout(config, mesh)) < 0.8
        return drawn and not (zero and lossy) and (mesh.tensor > 1 or not sequence)

    def fit(self, config: Config, mesh: Mesh) -> Any:
        needed = self._draw("fit", *self._layout(config, mesh))
        return SimpleNamespace(fits=needed <= self.memory, needed=needed)

    def bound(self, config: Config, mesh: Mesh) -> float:
        return self._draw("bound", mesh, config.train.micro_batch_size)

    def time(self, config: Config, mesh: Mesh) -> Any:
        self.times += 1
        compute, c = self.bound(config, mesh), config.communication
        exchanged = (c.exchange, c.bucket_bytes) if mesh.data > 1 else ()
        communication = self._draw("time", *self._layout(config, mesh), config.train.activation_checkpointing, *exchanged)
        return SimpleNamespace(seconds=compute + communication, compute=compute, communication=communication)


def all_layouts(config: Config, space: Space, costs: InventedCosts) -> list[tuple[float, Mesh]]:
    """Return the seconds and the mesh of every layout that is valid and fits, by trying all of them."""
    seconds = []
    sizes = range(1, space.ranks + 1)
    for data, pipeline, tensor in ((d, p, t) for d in sizes for p in sizes for t in sizes):
        mesh = Mesh(data, pipeline, tensor)
        if mesh.size != space.ranks or config.train.batch_size % data or pipeline > config.model.layers:
            continue
        rows = config.train.batch_size // data
        for micro in (None, *(n for n in range(1, rows) if rows % n == 0)):
            for sequence in (False, True) if tensor > 1 else (False,):
                for zero in (0, 1, 2) if data > 1 else (0,):
                    for recompute in (False, True):
                        for bucket in space.choices["communication.bucket_bytes"][: None if data > 1 else 1]:
                            options = {
                                "parallel.data": data,
                                "parallel.pipeline": pipeline,
                                "parallel.tensor": tensor,
                                "parallel.sequence": sequence,
                                "parallel.zero": zero,
                                "train.activation_checkpointing": recompute,
                                "train.micro_batch_size": micro,
                                "communication.bucket_bytes": bucket,
                            }
                            candidate = with_options(config, options)
                            if costs.valid(candidate, mesh) and costs.fit(candidate, mesh).fits:
                                seconds.append((costs.time(candidate, mesh).seconds, mesh))
    return sorted(seconds, key=lambda entry: entry[0])


@pytest.mark.parametrize("seed", range(8))
def test_the_search_finds_what_trying_all_layouts_finds(seed: int) -> None:
    config = small_config("torch")
    ranks = (1, 2, 4, 6, 8)[seed % 5]
    space, costs = make_space(config, configured_spec(config), ranks), InventedCosts(seed)
    expected = all_layouts(config, space, costs)
    tried, costs.times = costs.times, 0
    layouts = search(config, space, costs, count=3)
    best_of_meshes: dict[Mesh, float] = {}
    for seconds, mesh in expected:
        best_of_meshes.setdefault(mesh, seconds)
    assert [(layout.time.seconds, layout.mesh) for layout in layouts] == [
        (seconds, mesh) for mesh, seconds in list(best_of_meshes.items())[:3]
    ]
    assert costs.times <= tried


@pytest.mark.parametrize("seed", range(4))
def test_fewer_options_are_never_better(seed: int) -> None:
    config = small_config("torch")
    space, costs = make_space(config, configured_spec(config), 8), InventedCosts(seed)
    best = search(config, space, costs)[0]
    for option, values in space.choices.items():
        for value in values:
            restricted = search(config, space.only(option, value), costs)
            assert all(layout.time.seconds >= best.time.seconds for layout in restricted)
            assert all(layout.options[option] == value for layout in restricted)


def test_equal_layouts_are_listed_in_a_fixed_order() -> None:
    config = small_config("torch")
    costs = InventedCosts(0, memory=1.0)
    costs._draw = lambda purpose, *values: 0.5  # type: ignore[method-assign]
    layouts = search(config, make_space(config, configured_spec(config), 4), costs)
    assert layouts[0].mesh == Mesh(4, 1, 1)  # the plainest of equal ones
    assert value_of(layouts[0].config, "communication.bucket_bytes") == config.communication.bucket_bytes
    assert layouts[0].config.train.micro_batch_size is None and not layouts[0].config.parallel.zero


def test_options_that_the_user_gave_stay() -> None:
    config = small_config("torch")
    config.parallel.tensor, config.parallel.data, config.train.micro_batch_size = 2, 2, 1
    fixed = {"parallel.tensor", "parallel.data", "train.micro_batch_size", "parallel.zero"}
    space = make_space(config, configured_spec(config), 8, fixed)
    layouts = search(config, space, InventedCosts(1, memory=1.0))
    assert [layout.mesh for layout in layouts] == [Mesh(2, 2, 2)]
    assert layouts[0].config.train.micro_batch_size == 1 and layouts[0].config.parallel.zero == 0


def test_lossy_exchanges_are_searched_where_asked_for() -> None:
    config = small_config("torch")
    spec = configured_spec(config)
    assert make_space(config, spec, 4).choices["communication.exchange"] == ["all_reduce"]
    space = make_space(config, spec, 4, (), {"communication.exchange": ["diloco"]})
    assert space.choices["communication.exchange"] == ["all_reduce", "diloco"]


def test_gains_compare_with_the_best_layout_without_an_option() -> None:
    config = small_config("torch")
    space, costs = make_space(config, configured_spec(config), 8), InventedCosts(3)
    best: Layout = search(config, space, costs)[0]
    compared = gains(config, space, costs, best)
    differing = {name for name, value in best.options.items() if value != value_of(config, name)}
    assert {gain.option for gain in compared} == differing - {"parallel.data"}
    for gain in compared:
        assert gain.without is None or gain.without.time.seconds >= best.time.seconds
    largest = too_large(config, space, costs, best)
    assert largest is None or (not largest.fit.fits and largest.time.seconds < best.time.seconds)
