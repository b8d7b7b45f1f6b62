"""ZeRO-3's units, their buckets, and the memory that a plan predicts for them."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest

from hvdlm.config import Config, ModelConfig
from hvdlm.errors import HvdlmError
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.flat_layout import FlatLayout, LocalParam, whole
from hvdlm.parallel.held_bytes import HeldBytes
from hvdlm.parallel.layer_units import make_unit_layout, units_of
from hvdlm.planning.gathered_layers import gathers_of, held_at_peak, scattered_buckets
from hvdlm.training.abilities import check_abilities
from hvdlm_language.gpt import PRESETS


def spec_of(vocab: int, **settings: Any) -> ModelSpec:
    return PRESETS["gpt"](ModelConfig(**{"heads": 4, "layers": 3, "width": 32} | settings), vocab, 64)


def layout_of(spec: ModelSpec, ranks: int) -> FlatLayout:
    return make_unit_layout([LocalParam(param, whole(param.shape)) for param in spec.params], ranks)


@pytest.mark.parametrize("tied", [True, False])
def test_units_are_the_layers_and_hold_every_parameter_once(tied: bool) -> None:
    spec = spec_of(100, tie_embeddings=tied, bias=True)
    layout = layout_of(spec, 4)
    assert sorted(slot.name for slot in layout.slots) == sorted(param.name for param in spec.params)
    units = units_of(layout)
    assert [unit.name for unit in units] == ["embed", "layers.0", "layers.1", "layers.2", "head"]
    # One range of the vector for each, those of the backward pass first.
    assert [unit.elements[0] for unit in units[:-1]] == [unit.elements[1] for unit in units[1:]]
    assert units[-1].elements[0] == 0 and units[0].elements[1] == layout.size
    assert all((stop - start) % 4 == 0 for start, stop in map(layout.bucket_range, range(len(layout.buckets))))
    for unit in units:
        of_unit = [layout.slots[slice(*layout.buckets[index])] for index in range(*unit.buckets)]
        shared = [slots for slots in of_unit if len(slots) > 1]
        assert len(shared) <= 1 and of_unit[-1:] == (shared or of_unit[-1:])
        assert all(16 * slot.stop - 16 * slot.start < unit.size for slots in shared for slot in slots)


@pytest.mark.parametrize("in_graph", [False, True], ids=["counted", "in a graph"])
@pytest.mark.parametrize("layers, width, vocab", list(product([1, 2, 6, 24], [32, 256], [64, 1000, 50_000])))
def test_a_rank_holds_a_shard_two_layers_and_gradients_of_one(
    layers: int, width: int, vocab: int, in_graph: bool
) -> None:
    for tied, ranks in product([True, False], [4, 8, 64]):
        layout = layout_of(spec_of(vocab, layers=layers, width=width, tie_embeddings=tied), ranks)
        held = held_at_peak(layout, ranks, tied, in_graph)
        sizes = sorted(4 * unit.size for unit in units_of(layout))
        # Of four vectors with AdamW.
        allowed = 0.1 / ranks * 4 * 4 * layout.size + sum(sizes[-2:]) + sizes[-1]
        norm = 4 * units_of(layout)[-1].size if tied else 0  # of the head, which is a layer with the embedding's table
        two = sum(sizes[-2:]) if layers > 1 else 2 * sizes[-1]  # of one layer, what is received and its copy
        assert 0 < held["parameters"] <= two + norm
        assert sum(held.values()) <= allowed, (tied, ranks, held, sizes[-3:], sum(held.values()) / allowed)


def test_gathers_are_those_that_the_passes_need() -> None:
    layout = layout_of(spec_of(100), 2)
    counts = {unit.name: sum(times) for unit, times in gathers_of(layout, True)}
    assert counts == {"embed": 2, "layers.0": 2, "layers.1": 2, "layers.2": 1, "head": 1}
    assert {unit.name: sum(times) for unit, times in gathers_of(layout, False)}["embed"] == 1
    tied, untied = scattered_buckets(layout, True), scattered_buckets(layout, False)
    assert untied == list(range(len(layout.buckets))) and tied[1:] == untied
    assert layout.slots[layout.buckets[tied[0]][0]].name == "embed.tokens"


def test_held_bytes_are_those_of_the_moment_with_most() -> None:
    held = HeldBytes("parameters", "gradients")
    held.take("parameters", 5)
    held.take("gradients", 4)
    held.free("parameters", 5)
    held.take("gradients", 3)
    assert held.at_peak == {"parameters": 5, "gradients": 4} and held.now == held.of("gradients") == 7


def test_a_framework_that_has_no_zero_3_is_refused() -> None:
    framework: Any = SimpleNamespace(name="jax", abilities=("groups",))
    config = Config()
    check_abilities(framework, config)
    config.parallel.zero = 3
    with pytest.raises(HvdlmError, match="framework jax can't gather parameters layer by layer"):
        check_abilities(framework, config)
