"""Seconds of a step from its work and a machine's rates: schedules, overlap, collectives, stragglers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hvdlm.config import Config, ModelConfig, ParallelConfig, TrainConfig
from hvdlm.parallel.mesh import Mesh
from hvdlm.planning.closed_forms import idle_share
from hvdlm.planning.hardware import Hardware, Link, MeasuredCollective, Rates, Sharing
from hvdlm.planning.rates import Computation, Network, slowest_of
from hvdlm.planning.step_time import StepTime, predict_time, resolved, step_time
from hvdlm.planning.work import Bucket, Collective, Overlapped, Pass, Product, Segment, Work
from hvdlm_language.presets import PRESETS

NODE, NETWORK = Link(0.0, 1e9), Link(0.0, 1e8)
MACHINE = Hardware("test", "", "", (Rates(1e9, 1e9),), {"node": NODE, "network": NETWORK}, ranks_per_node=4)


def given(
    work: Work | list[Work], mesh: tuple[int, int, int], machine: Hardware = MACHINE, **options: object
) -> StepTime:
    works = work if isinstance(work, list) else [work]
    computation = Computation(machine, "torch", "fp32", 1, Mesh(*mesh).size)
    return step_time(works, "1f1b", computation, Network(machine, Mesh(*mesh)), **options)  # type: ignore[arg-type]


def two_layers(first: float, second: float, **more: object) -> Work:
    """Return work with two segments that take 1 s forward, and these seconds backward, the second one first."""
    segments = (Segment("a", Pass(seconds=1), Pass(seconds=first)), Segment("b", Pass(seconds=1), Pass(seconds=second)))
    return Work(segments, **more)  # type: ignore[arg-type]


def bucket(ready: int, seconds: float, ranks: int = 4) -> Bucket:
    size = seconds * NODE.bytes_per_second / (2 * (ranks - 1) / ranks)
    return Bucket(ready, size / 4, (Collective("all_reduce", size, "data"),))


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("stages, micro_batches", [(2, 4), (4, 4), (4, 16)])
def test_equal_stages_idle_for_the_known_share(schedule: str, stages: int, micro_batches: int) -> None:
    work = two_layers(1, 1, micro_batches=micro_batches)
    computation, network = Computation(MACHINE, "torch", "fp32"), Network(MACHINE, Mesh(1, stages, 1))
    time = step_time([work] * stages, schedule, computation, network)
    assert time.compute == pytest.approx(4 * micro_batches)
    assert time.bubble / time.seconds == pytest.approx(idle_share(stages, micro_batches))


def test_interleaved_stages_divide_the_bubble() -> None:
    works = [two_layers(1, 1, micro_batches=8)] * 4
    assert given(works, (1, 4, 1), interleaved=4).bubble == pytest.approx(given(works, (1, 4, 1)).bubble / 4)


@pytest.mark.parametrize("stages, micro_batches", [(2, 4), (4, 8)])
def test_virtual_stages_shrink_the_bubble_by_their_schedule(stages: int, micro_batches: int) -> None:
    work = two_layers(1, 1, micro_batches=micro_batches, chunks=(1, 1))
    time = given([work] * stages, (1, stages, 1))
    assert time.compute == pytest.approx(4 * micro_batches)
    assert time.bubble / time.seconds == pytest.approx(idle_share(stages, micro_batches, 2))


def test_a_slow_stage_makes_the_others_wait() -> None:
    slow = Work((Segment("a", Pass(seconds=4), Pass(seconds=4)),), micro_batches=8)
    time = given([two_layers(1, 1, micro_batches=8), slow], (1, 2, 1))
    assert time.compute == pytest.approx(64) and time.bubble == pytest.approx(
        2 + 2
    )  # for the first input, and the last


def test_a_bucket_is_hidden_behind_earlier_layers() -> None:
    time = given(two_layers(3, 1, buckets=(bucket(1, 2.0),)), (4, 1, 1))
    assert (time.compute, time.communication, time.hidden) == pytest.approx((6.0, 0.0, 2.0))


def test_what_the_backward_pass_does_not_hide_is_exposed() -> None:
    time = given(two_layers(3, 1, buckets=(bucket(1, 5.0), bucket(0, 1.0))), (4, 1, 1))
    assert (time.compute, time.communication, time.hidden) == pytest.approx((6.0, 3.0, 3.0))


def test_computing_beside_a_collective_is_slower() -> None:
    machine = replace(MACHINE, overlap_slowdown=1.5)
    time = given(two_layers(3, 1, buckets=(bucket(1, 1.5),)), (4, 1, 1), machine)
    assert time.seconds == pytest.approx(6.5)  # 1 s of 3 takes half as long again


def test_zero_2_sends_in_every_micro_batch() -> None:
    work = two_layers(1, 1, buckets=(bucket(0, 2.0),), micro_batches=3)
    assert given(work, (4, 1, 1)).communication == pytest.approx(2.0)
    assert given(replace(work, scatters_every=True), (4, 1, 1)).communication == pytest.approx(6.0)


def test_parameters_are_gathered_behind_the_layer_before() -> None:
    gather = Collective("all_gather", 1.5 * NODE.bytes_per_second / 0.75, "data")  # 1.5 s
    segments = tuple(Segment(str(i), Pass(seconds=1, gathers=(gather,)), Pass(seconds=1)) for i in range(3))
    time = given(Work(segments), (4, 1, 1))
    assert time.communication == pytest.approx(1.5 + 2 * 0.5) and time.hidden == pytest.approx(2.0)


def test_blocking_collectives_add_up() -> None:
    sums = (Collective("all_reduce", 1e9, "tensor", 2.0),)
    segment = Segment("a", Pass(seconds=1, blocking=sums), Pass(seconds=2, blocking=sums))
    time = given(Work((segment,), micro_batches=2), (1, 1, 2))
    assert time.communication == pytest.approx(2 * 4 * 1.0) and time.compute == pytest.approx(6.0)


@pytest.mark.parametrize(
    "products, slowdown, waited", [(0.0, 1.0, 1.0), (0.4, 1.0, 0.6), (3.0, 1.0, 0.0), (2.0, 1.5, 1 / 3)]
)
def test_sums_beside_products_cost_what_these_do_not_hide(products: float, slowdown: float, waited: float) -> None:
    """``products``: seconds of those that are computed beside a sum of 1 s; ``slowdown``: of them, meanwhile."""
    columns = tuple(Product(1e3, 1e3, 500 * products) for _ in range(bool(products)))
    sums = (Overlapped(Collective("all_reduce", 1e9, "tensor"), columns),)
    segment = Segment("a", Pass(seconds=1), Pass(columns, seconds=2, overlapped=sums))
    time = given(Work((segment,), micro_batches=2), (1, 1, 2), replace(MACHINE, overlap_slowdown=slowdown))
    assert time.compute == pytest.approx(2 * (3 + products), rel=0.02)  # products move bytes, too
    assert time.communication == pytest.approx(2 * waited, abs=0.02)


@pytest.mark.parametrize("sequence", [False, True])
def test_sums_of_inputs_wait_for_all_in_compiled_steps(sequence: bool) -> None:
    config = Config(model=ModelConfig(layers=2, width=64, heads=4))
    config.train = TrainConfig(batch_size=8, compile=False)
    config.parallel = ParallelConfig(tensor=2, sequence=sequence)
    spec, mesh = PRESETS["gpt"](config.model, 100, 64), Mesh(1, 1, 2)
    slow = replace(MACHINE, links={"node": Link(0.0, 1e7), "network": NETWORK})
    plain = predict_time(config, spec, mesh, slow)
    compiled = predict_time(replace(config, train=replace(config.train, compile=True)), spec, mesh, slow)
    assert plain is not None and compiled is not None and plain.communication < compiled.communication


@pytest.mark.parametrize("prefetch, waited", [(True, 1.0), (False, 5.0)])
def test_batches_made_ahead_cost_only_what_steps_do_not_hide(prefetch: bool, waited: float) -> None:
    time = given(two_layers(1, 1), (1, 1, 1), data_seconds=5.0, prefetch=prefetch)
    assert time.data == pytest.approx(waited)


def test_a_group_across_nodes_shares_the_network() -> None:
    # 4 ranks on each of 2 nodes. All 8 in one ring: the node's whole network. Pairs of ranks 4 apart: a quarter each.
    whole = Network(MACHINE, Mesh(8, 1, 1)).seconds(Collective("all_gather", 8e8, "data"))
    assert whole == pytest.approx(7 / 8 * 8e8 / 1e8)
    quarter = Network(MACHINE, Mesh(2, 1, 4)).seconds(Collective("all_gather", 8e8, "data"))
    assert quarter == pytest.approx(1 / 2 * 8e8 / (1e8 / 4))
    inside = Network(MACHINE, Mesh(2, 1, 4)).seconds(Collective("all_gather", 8e8, "tensor"))
    assert inside == pytest.approx(3 / 4 * 8e8 / 1e9)


def test_few_bytes_take_logarithmic_many_messages() -> None:
    machine = replace(MACHINE, links={"node": Link(1e-3, 1e9), "network": NETWORK})
    network = Network(machine, Mesh(4, 1, 1))
    assert network.seconds(Collective("all_reduce", 8, "data")) == pytest.approx(2e-3, rel=0.01)
    assert network.seconds(Collective("all_gather", 8, "data")) == pytest.approx(2e-3, rel=0.01)
    ring = Network(replace(machine, gathers_by_ring=True), Mesh(4, 1, 1))
    assert ring.seconds(Collective("all_gather", 8, "data")) == pytest.approx(3e-3, rel=0.01)


def test_measured_collectives_replace_the_formula() -> None:
    curve = MeasuredCollective("all_reduce", 2, (1e3, 1e6), (1e-3, 3e-3))
    machine = replace(MACHINE, collectives=(curve,))
    network = Network(machine, Mesh(2, 1, 1))
    assert network.seconds(Collective("all_reduce", 1e3, "data")) == pytest.approx(1e-3)
    assert 1e-3 < network.seconds(Collective("all_reduce", 5e5, "data")) < 3e-3
    assert network.seconds(Collective("all_reduce", 1.999e6, "data")) == pytest.approx(5e-3)  # 2 ms for 999,000 bytes
    four = Network(machine, Mesh(4, 1, 1)).seconds(Collective("all_reduce", 1e6, "data"))
    assert four == pytest.approx(3e-3 * 1.5)  # as the ring's shares of the bytes: 3/4 and 1/2


def test_a_pair_among_four_ranks_has_a_table_of_its_own() -> None:
    def curve(ranks: int, ranks_per_node: int, seconds: float) -> MeasuredCollective:
        return MeasuredCollective("all_reduce", ranks, (1.0, 1e6), (seconds, seconds), ranks_per_node=ranks_per_node)

    machine = replace(MACHINE, collectives=(curve(2, 4, 4e-3), curve(2, 2, 1e-3), curve(4, 4, 8e-3)))
    tensor = Collective("all_reduce", 1e3, "tensor")
    assert Network(machine, Mesh(1, 1, 2)).seconds(tensor) == pytest.approx(1e-3)
    assert Network(machine, Mesh(2, 1, 2)).seconds(tensor) == pytest.approx(4e-3)
    assert Network(machine, Mesh(1, 1, 4)).seconds(tensor) == pytest.approx(8e-3)


def test_a_collective_beside_computation_takes_longer() -> None:
    """Computation 4 s at half speed beside a collective that takes 1.5 times as long there, and the rest alone."""
    machine = replace(MACHINE, rates=(Rates(1e9, 1e9, overlap_slowdown=2.0, collective_slowdown=1.5),))
    hidden = given(two_layers(3, 1, buckets=(bucket(1, 1.0),)), (4, 1, 1), machine)
    assert hidden.seconds == pytest.approx(2 + 1 + 3 + 0.75) and hidden.communication == 0
    exposed = given(two_layers(1, 1, buckets=(bucket(1, 4.0),)), (4, 1, 1), machine)
    assert exposed.compute == pytest.approx(2 + 1 + 2)
    assert exposed.communication == pytest.approx(4 - 2 / 1.5)


def test_stages_that_wait_make_others_faster() -> None:
    machine = replace(MACHINE, rates=(Rates(1e9, 1e9, bubble_factor=0.4, pass_seconds=0.5),))
    time = given([two_layers(1, 1, micro_batches=4, send_bytes=1e-9)] * 2, (1, 2, 1), machine)
    assert time.compute == pytest.approx(4 * (4 + 2 * 0.5)) and time.bubble == pytest.approx(0.4 * 5)


def test_a_step_waits_for_the_slowest_of_its_ranks() -> None:
    random = np.random.Generator(np.random.Philox(key=1)).normal(1.0, 0.02, (4000, 64))
    assert slowest_of(64, 0.02) == pytest.approx(random.max(1).mean(), abs=3e-4)
    machine = replace(MACHINE, speed_deviation=0.02)
    assert given(two_layers(1, 1), (4, 1, 1), machine).compute == pytest.approx(4 * slowest_of(4, 0.02))


def test_rates_that_fit_best_count() -> None:
    def at(rate: float, **where: object) -> Rates:
        return Rates(rate, 1e9, **where)  # type: ignore[arg-type]

    rates = (at(1), at(2, framework="torch"), at(3, precision="bf16"), at(4, framework="torch", precision="bf16"))
    machine = replace(MACHINE, rates=rates, sharing=(Sharing(2, products=1.5),))
    chosen = [
        machine.rates_of(*key).product_flops_per_second for key in (("x", "fp32"), ("torch", "fp32"), ("x", "bf16"))
    ]
    assert chosen == [1, 2, 3] and machine.rates_of("torch", "bf16").product_flops_per_second == 4
    shared = replace(machine, rates=(at(1e9), at(2e9, ranks=2)))
    assert Computation(shared, "torch", "fp32", 2).sharing.products == 1.0  # measured with two ranks
    assert shared.rates_of("torch", "fp32", 2).product_flops_per_second == 2e9


def test_measured_products_are_met_and_interpolated() -> None:
    rows = tuple((m, 64.0, 64.0, 2.0 * m * 64 * 64 / 5e8 + 1e-5) for m in (64.0, 256.0, 1024.0, 4096.0))
    computation = Computation(replace(MACHINE, rates=(Rates(1e9, 1e10, products=rows),)), "torch", "fp32")
    for m, k, n, seconds in rows:
        assert computation.product(m, k, n) == pytest.approx(seconds)
    assert computation.product(512, 64, 64) == pytest.approx(2.0 * 512 * 64 * 64 / 5e8 + 1e-5, rel=0.1)


@pytest.mark.parametrize("zero", [0, 1, 2])
@pytest.mark.parametrize("mesh", [(4, 1, 1), (1, 4, 1), (1, 1, 4), (2, 2, 2)])
@pytest.mark.parametrize("name", ["gpt", "lstm"])
def test_every_layout_has_a_predicted_time(name: str, mesh: tuple[int, int, int], zero: int) -> None:
    config = Config(model=ModelConfig(name=name, layers=4, width=64, heads=4))
    config.train = TrainConfig(batch_size=16, micro_batch_size=2)
    config.parallel = ParallelConfig(*mesh, zero=zero)  # type: ignore[arg-type]
    spec = PRESETS[name](config.model, 96, config.data.context)
    time = predict_time(config, spec, Mesh(*mesh), MACHINE)
    assert time is not None and time.compute > 0 and min(time.communication, time.bubble, time.hidden) >= 0
    assert time.seconds == pytest.approx(time.compute + time.communication + time.bubble)


def test_zero_3_waits_for_the_gathers_that_layers_don_t_hide() -> None:
    def time_of(zero: int, bandwidth: float) -> StepTime:
        config = Config(model=ModelConfig(layers=4, width=64, heads=4))
        config.train = TrainConfig(batch_size=16, micro_batch_size=2)
        config.parallel = ParallelConfig(4, zero=zero)  # type: ignore[arg-type]
        spec = PRESETS["gpt"](config.model, 96, config.data.context)
        machine = replace(MACHINE, links={"node": Link(0.0, bandwidth), "network": NETWORK})
        predicted = predict_time(config, spec, Mesh(4, 1, 1), machine)
        assert predicted is not None
        return predicted

    whole, gathered = time_of(2, 1e8), time_of(3, 1e8)
    assert gathered.communication + gathered.hidden > whole.communication + whole.hidden  # all that is sent
    assert gathered.hidden > gathered.communication > 0
    # On a fast network the embedding's gather alone isn't hidden, in each of two micro-batches.
    fast = time_of(3, 1e12)
    assert fast.communication < 0.01 * fast.seconds and fast.hidden > 0


def test_auto_precision_is_that_of_the_machine() -> None:
    rates = (Rates(1e9, 1e9, precision="bf16"), Rates(1e9, 1e9, precision="fp32"))
    gpu = replace(MACHINE, rates=rates, device="gpu")
    assert resolved(Config(), gpu).train.precision == "bf16"
    assert resolved(Config(), MACHINE).train.precision == "fp32"


def test_saves_are_spread_over_the_steps_between_them() -> None:
    machine = replace(MACHINE, save_bytes_per_second=1e6)
    assert given(two_layers(1, 1, saved_bytes=5e5), (1, 1, 1), machine).save == pytest.approx(0.5)
