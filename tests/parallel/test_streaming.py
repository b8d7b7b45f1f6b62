"""Streaming DiLoCo on real ranks, compared with the paper's algorithm in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from builders import case
from hvdlm import plugins
from hvdlm.config import CommunicationConfig, CompressionConfig, Config, LocalConfig, TrainConfig
from hvdlm.errors import HvdlmError
from hvdlm.models.spec import Init, ParamSpec
from hvdlm.parallel.flat_layout import FlatLayout, make_layout
from hvdlm.protocols.world import World
from launching import FRAMEWORK

# In the flat vector the last comes first: 2,700, 60 and 2,400 elements.
SHAPES = {"wide": (40, 60), "bias": (60,), "tall": (90, 30)}
HALVES = [slice(0, 2580), slice(2580, 5160)]  # the boundary of two fragments: 86 of the 90 rows of ``tall``
EVERY, STEPS = 4, 11


@pytest.fixture(scope="module")
def manager() -> Any:
    return plugins.load([FRAMEWORK, "all_reduce", "compression", "diloco", "streaming_diloco"])


def layout() -> FlatLayout:
    return make_layout([ParamSpec(n, s, ("a",) * len(s), Init("zeros")) for n, s in SHAPES.items()], 10**9)


def make(
    manager: Any,
    world: World,
    local: LocalConfig,
    algorithm: str = "none",
    name: str = "streaming_diloco",
    steps: int = 10**6,
) -> Any:
    """Return an exchange over all ranks, opened with ``start()``."""
    options = CommunicationConfig(exchange=name, local=local, compression=CompressionConfig(algorithm=algorithm))
    config = Config(framework=FRAMEWORK, communication=options, train=TrainConfig(steps=steps))
    exchange = plugins.make_exchange(manager, config, world, world.group(range(world.size)))
    exchange.open(layout(), start())
    return exchange


def start() -> np.ndarray:
    return np.linspace(-1, 1, layout().size).astype(np.float32)


def moves(ranks: int) -> np.ndarray:
    """Return what every rank's inner steps subtract, float32 ``[steps, ranks, size]``, the same on all of them."""
    random = np.random.default_rng(7)
    return (random.normal(size=(STEPS, ranks, layout().size)) * 0.01).astype(np.float32)


def train(exchange: Any, own: np.ndarray, moved: np.ndarray, tensor: Any, first: int = 0) -> np.ndarray:
    """Do the steps of ``moved`` ``[steps, size]`` from ``own``; return this rank's parameters after each of them."""
    own, history = own.copy(), []
    for step, move in enumerate(moved, first):
        exchange.begin(step)
        own -= move
        for begin, values in exchange.advance(tensor(own.copy())):
            values = np.asarray(values)
            own[begin : begin + len(values)] = values
        history.append(own.copy())
    return np.stack(history)


@pytest.mark.parametrize("algorithm", ["int4", "power_sgd"])
def test_all_but_collectives_can_be_called_as_graphs(manager: Any, world: World, tensor: Any, algorithm: str) -> None:
    called = set()

    def call(function: Any, *arguments: Any) -> Any:
        called.add(function.func.__name__)
        return function(*arguments)

    moved = moves(world.size)[:, world.rank]
    histories = []
    for second in ((), (call,)):
        exchange = make(manager, world, LocalConfig(EVERY, 0.7, 0.9, fragments=2), algorithm)
        advance = exchange.advance
        exchange.advance = lambda own, advance=advance, second=second: advance(own, *second)
        histories.append(train(exchange, start(), moved, tensor))
    np.testing.assert_array_equal(*histories)
    assert called == ({"_encode", "_decode", "_update"} if algorithm == "int4" else {"_difference", "_update"})
    called.clear()
    exchange.state()  # takes the sums in flight as a step does: another graph may round otherwise
    assert called == ({"_decode"} if algorithm == "int4" else set())


@pytest.mark.parametrize("overlap", [0, 1, 3])
def test_streaming_diloco_follows_the_papers_algorithm(manager: Any, world: World, tensor: Any, overlap: int) -> None:
    """Douillard et al. 2025, algorithm 2, with H = 4, two fragments and given inner steps."""
    exchange = make(manager, world, LocalConfig(EVERY, 0.7, 0.9, fragments=2, overlap=overlap, mixing=0.25))
    moved = moves(world.size)
    actual = train(exchange, start(), moved[:, world.rank], tensor)
    own = np.tile(start().astype(np.float64), (world.size, 1))
    agreed, velocity = start().astype(np.float64), np.zeros(layout().size)
    sums: dict[int, np.ndarray] = {}
    for done in range(1, STEPS + 1):
        own -= moved[done - 1]
        for offset, half in zip((0, 2), HALVES, strict=True):
            if done % EVERY == offset:
                sums[done + overlap] = agreed[half] - own[:, half].mean(0)
            if done in sums and (done - overlap) % EVERY == offset:
                velocity[half] = 0.9 * velocity[half] + sums[done]
                agreed[half] -= 0.7 * (sums.pop(done) + 0.9 * velocity[half])
                own[:, half] = 0.25 * own[:, half] + 0.75 * agreed[half]
        np.testing.assert_allclose(actual[done - 1], own[world.rank], atol=3e-6, err_msg=str(done))
    exchange.state()  # waits for the sums in flight
    np.testing.assert_allclose(exchange.averaged(), agreed, atol=3e-6)
    assert world.size == 1 or np.abs(actual[-1] - exchange.averaged()).max() > 1e-3  # replicas never agree


def test_one_fragment_that_travels_at_once_is_diloco(manager: Any, world: World, tensor: Any) -> None:
    streaming = make(manager, world, LocalConfig(EVERY, fragments=1, overlap=0, mixing=0.0))
    blocking = make(manager, world, LocalConfig(EVERY), name="diloco")
    moved = moves(world.size)[:8, world.rank]
    actual, own = train(streaming, start(), moved, tensor), start()
    for step, move in enumerate(moved):
        blocking.begin(step)
        own = own - move
        replaced = blocking.finish(tensor(own.copy()))
        own = own if replaced is None else np.asarray(replaced).copy()
        np.testing.assert_array_equal(actual[step], own)


SUMMED = case("random_k", covered_by="none and power_sgd, which are summed, and top_k, of few elements")


@pytest.mark.parametrize("algorithm", ["none", "int4", "top_k", SUMMED, "power_sgd"])
def test_a_state_with_sums_in_flight_continues_bit_for_bit(
    manager: Any, world: World, tensor: Any, algorithm: str
) -> None:
    local, moved = LocalConfig(EVERY, fragments=EVERY, overlap=3), moves(world.size)[:, world.rank]
    whole = make(manager, world, local, algorithm)
    expected = train(whole, start(), moved, tensor)
    whole.state()  # waits for the sums in flight, whose names the others use
    first, second = make(manager, world, local, algorithm), make(manager, world, local, algorithm)
    before = train(first, start(), moved[:6], tensor)
    state = first.state()
    assert sum(name.startswith("in_flight/") for name in state) == 3
    second.open(layout(), first.averaged())
    second.load_state(state)
    np.testing.assert_array_equal(train(second, before[-1], moved[6:], tensor, 6), expected[6:])
    np.testing.assert_array_equal(second.averaged(), whole.averaged())
    second.state()
    # The one whose state was taken continues, too.
    np.testing.assert_array_equal(train(first, before[-1], moved[6:], tensor, 6), expected[6:])
    first.state()


def test_averaged_parameters_are_the_same_bits_on_all_ranks(manager: Any, world: World, tensor: Any) -> None:
    exchange = make(manager, world, LocalConfig(EVERY, overlap=2), "int4")
    own = train(exchange, start(), moves(world.size)[:, world.rank], tensor)[-1]
    exchange.state()  # waits for the sums in flight
    averages, owns = (world.gather_objects(array.tobytes().hex()) for array in (exchange.averaged(), own))
    assert len(set(averages)) == 1 and len(set(owns)) == world.size


def test_ranks_continue_while_a_sum_travels(manager: Any, world: World, tensor: Any) -> None:
    """Rank 0 finishes the step that starts a sum before the others have reached it."""
    exchange = make(manager, world, LocalConfig(EVERY, fragments=1, overlap=1), "int4")
    own, moved = start(), moves(world.size)[:, world.rank]
    for step in range(EVERY):
        if step == EVERY - 1 and world.rank != 0:
            world.broadcast_object(None)  # rank 0 sends it after the step
        own = train(exchange, own, moved[step : step + 1], tensor, step)[-1]
    if world.rank == 0:
        world.broadcast_object("done")
    train(exchange, own, moved[EVERY : EVERY + 1], tensor, EVERY)
    assert not exchange.state().keys() & {"in_flight"} and np.abs(exchange.averaged() - start()).max() > 1e-3


@pytest.mark.parametrize("overlap", [0, 1])
def test_the_last_round_is_short(manager: Any, world: World, tensor: Any, overlap: int) -> None:
    """In the last quarter of H steps every fragment synchronises once more, and all sums arrive."""
    exchange = make(manager, world, LocalConfig(8, overlap=overlap), steps=STEPS)
    moved = moves(world.size)[:, world.rank]
    own = train(exchange, start(), moved[: STEPS - 2], tensor)[-1]
    before = exchange.averaged()
    own = train(exchange, own, moved[STEPS - 2 :], tensor, STEPS - 2)[-1]
    changed = exchange.averaged() != before
    assert changed.mean() > 0.99 and not any(name.startswith("in_flight/") for name in exchange.state())


def test_gradients_are_summed_in_the_warm_up(manager: Any, world: World, tensor: Any) -> None:
    exchange = make(manager, world, LocalConfig(EVERY, warmup=3, overlap=1))
    moved = moves(world.size).mean(1)
    gradient = np.full(8, world.rank + 1, np.float32)
    for step in range(3):
        assert exchange.begin(step) == "every" and exchange.averaged() is None and exchange.stands_for == 1
        total = np.asarray(exchange.start(tensor(gradient.copy()), 0).wait())
        np.testing.assert_array_equal(total, np.full(8, world.size * (world.size + 1) / 2))
        own = start() - moved[: step + 1].sum(0)
        assert exchange.advance(tensor(own.copy())) == []
    np.testing.assert_array_equal(exchange.averaged(), own)
    assert exchange.begin(3) == "local" and exchange.stands_for == world.size
    np.testing.assert_array_equal(np.asarray(exchange.start(tensor(gradient.copy()), 0).wait()), gradient)


def test_a_framework_that_does_not_advance_is_refused(manager: Any, world: World) -> None:
    exchange = make(manager, world, LocalConfig(EVERY))
    exchange.begin(0)
    with pytest.raises(HvdlmError, match="doesn't call the exchange's advance"):
        exchange.begin(1)
