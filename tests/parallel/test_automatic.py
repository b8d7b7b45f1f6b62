"""The exchange of communication.auto on real ranks: its methods, switches between them, its state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hvdlm import plugins
from hvdlm.config import CommunicationConfig, Config
from hvdlm.errors import HvdlmError
from hvdlm.models.spec import Init, ParamSpec
from hvdlm.parallel.flat_layout import FlatLayout, make_layout
from hvdlm.protocols.world import World
from launching import FRAMEWORK

SHAPES = {"a": (40, 60), "b": (60,), "c": (90, 30), "d": (50, 50)}


@pytest.fixture(scope="module")
def manager() -> Any:
    return plugins.load([FRAMEWORK, "all_reduce", "compression", "auto"])


def layout() -> FlatLayout:
    return make_layout([ParamSpec(n, s, ("a",) * len(s), Init("zeros")) for n, s in SHAPES.items()], 4000)


def make(manager: Any, world: World, algorithm: str = "none", auto: bool = True) -> Any:
    options = CommunicationConfig(auto=auto, max_loss_gap=1.0 if auto else 0.0, bucket_bytes=4000)
    options.compression.algorithm = algorithm
    config = Config(framework=FRAMEWORK, communication=options)
    context = {"compressors": plugins.provided(manager, "compressors"), "index": world.rank}
    group = world.group(range(world.size))
    exchange = plugins.make(manager, "exchange", "all_reduce", group=group, config=config, **context)
    exchange.open(layout(), np.zeros(layout().size, np.float32))
    return exchange


def train(exchange: Any, world: World, tensor: Any, first: int, last: int) -> np.ndarray:
    """Return the sums of steps ``first`` to ``last``, exclusive: float32 ``[steps, size]``."""
    sums = []
    for step in range(first, last):
        own = np.random.default_rng([step, world.rank]).normal(size=layout().size).astype(np.float32)
        exchange.begin(step)
        ranges = [layout().bucket_range(index) for index in range(len(layout().buckets))]
        handles = [exchange.start(tensor(own[a:b].copy()), index) for index, (a, b) in enumerate(ranges)]
        sums.append(np.concatenate([np.asarray(handle.wait()) for handle in handles]))
    return np.stack(sums)


@pytest.fixture
def several(world: World) -> World:
    """Skip on one rank, whose gradients need no method."""
    if world.size == 1:
        pytest.skip("one rank has nothing to choose")
    return world


@pytest.mark.parametrize("method", ["dense", "dense x4", "dense whole"])
def test_buckets_that_are_sent_together_have_the_same_sums(
    manager: Any, several: World, tensor: Any, method: str
) -> None:
    exchange = make(manager, several)
    exchange.log.add(0, method, "")
    traffic = several.group(range(several.size)).traffic
    before = traffic["gradients/all_reduce"].calls if "gradients/all_reduce" in traffic else 0
    actual = train(exchange, several, tensor, 0, 2)
    own = [np.random.default_rng([1, rank]).normal(size=layout().size) for rank in range(several.size)]
    np.testing.assert_allclose(actual[1], np.sum(own, 0, dtype=np.float32), atol=1e-5)
    assert traffic["gradients/all_reduce"].calls - before == {"dense": 6, "dense x4": 4, "dense whole": 2}[method]


@pytest.mark.parametrize("method", ["fp16", "int8", "scaled_sign", "power_sgd", "top_k"])
def test_a_method_sums_as_the_same_compressor_by_hand(manager: Any, several: World, tensor: Any, method: str) -> None:
    automatic, by_hand = make(manager, several), make(manager, several, method, auto=False)
    automatic.log.add(0, method, "")
    np.testing.assert_array_equal(train(automatic, several, tensor, 0, 3), train(by_hand, several, tensor, 0, 3))
    assert (automatic.residual() is None) == (method in ("fp16", "int8"))
    if (norm := by_hand.error_norm()) is not None:
        errors = [array for name, array in by_hand.state().items() if name.startswith("error/")]
        assert automatic.residual() == norm == pytest.approx(np.sqrt(sum(np.square(e).sum() for e in errors)))


def test_error_feedback_is_empty_after_a_switch(manager: Any, several: World, tensor: Any) -> None:
    exchange, fresh = make(manager, several), make(manager, several)
    for step, method in ((0, "scaled_sign"), (3, "dense"), (5, "scaled_sign")):
        exchange.log.add(step, method, "")
    fresh.log.add(0, "scaled_sign", "")
    phases = {exchange.begin(step) for step in range(3)}
    assert phases == {"scaled_sign/None"}
    train(exchange, several, tensor, 0, 5)
    assert exchange.begin(4) == "dense/None" and exchange.residual() is None
    np.testing.assert_array_equal(train(exchange, several, tensor, 5, 8), train(fresh, several, tensor, 5, 8))


@pytest.mark.parametrize("method", ["dense", "scaled_sign", "power_sgd"])
def test_a_restored_automatic_exchange_continues(manager: Any, several: World, tensor: Any, method: str) -> None:
    exchange = make(manager, several)
    exchange.log.add(0, method, "why")
    exchange.log.add(6, "int8", "later")
    train(exchange, several, tensor, 0, 4)
    state = exchange.state()
    restored = make(manager, several)
    restored.load_state(state)
    assert restored.log == exchange.log and restored.log.decisions[0].reason == "why"
    np.testing.assert_array_equal(train(restored, several, tensor, 4, 9), train(exchange, several, tensor, 4, 9))
    logs = several.gather_objects(state["auto/decisions"].tobytes().hex())
    assert len(set(logs)) == 1


def test_a_damaged_log_is_an_error(manager: Any, several: World) -> None:
    exchange = make(manager, several)
    with pytest.raises(HvdlmError, match="auto/decisions is damaged"):
        exchange.load_state({"auto/decisions": np.frombuffer(b'{"decisions": 3}', np.uint8)})


@pytest.mark.parametrize("method", ["fp16", "int8", "power_sgd"])
def test_the_cost_of_a_compressor_counts_what_it_sends(manager: Any, several: World, method: str) -> None:
    from hvdlm_auto import measure

    exchange = make(manager, several)
    computed = measure.compressor_cost(exchange, method)
    assert computed.start > 0 and computed.finish > 0
    layout_bytes = {"fp16": 2.0, "int8": 1.0 + 4 / 256}.get(method)
    sent = sum(computed.sent.values())
    assert sent < 4.0 if layout_bytes is None else sent == pytest.approx(layout_bytes, rel=0.1)
    assert {number for _, number in computed.sent} == ({0, 1} if method == "power_sgd" else {0})


def test_the_wire_is_measured_alike_on_all_ranks(manager: Any, several: World) -> None:
    from hvdlm_auto import measure

    group = several.group(range(several.size))
    lines = measure.measure_wire(["all_reduce float32", "all_gather uint8"], group, several)
    values = [[line.latency, line.per_byte] for line in lines.values()]
    assert all(latency > 0 and per_byte >= 0 for latency, per_byte in values)
    assert several.gather_objects(values) == [values] * several.size
