"""The exchange of communication.auto on real ranks: its methods, switches between them, its state."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from builders import case
from hvdlm import plugins
from hvdlm.config import CommunicationConfig, Config
from hvdlm.errors import HvdlmError
from hvdlm.models.spec import Init, ParamSpec
from hvdlm.parallel.flat_layout import FlatLayout, make_layout
from hvdlm.parallel.mesh import Mesh
from hvdlm.protocols.types import StepResult
from hvdlm.protocols.world import World
from launching import FRAMEWORK

# In TensorFlow, which traces: one that replaces gradients, one of sparse ones, one with a state of its own.
IN_TENSORFLOW = ("int8", "top_k", "power_sgd")
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
    exchange = plugins.make_exchange(manager, config, world, world.group(range(world.size)))
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


def methods_of(*names: str) -> list[Any]:
    """Return cases for these methods of an exchange."""
    left = [name for name in names if FRAMEWORK == "tensorflow" and name not in IN_TENSORFLOW]
    others = "this method in PyTorch, and other methods in TensorFlow"
    return [case(name, covered_by=others if name in left else "") for name in names]


@pytest.mark.parametrize("method", methods_of("fp16", "int8", "scaled_sign", "power_sgd", "top_k"))
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


@pytest.mark.parametrize("method", methods_of("dense", "scaled_sign", "power_sgd"))
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


def test_the_wire_is_measured_alike_on_all_ranks(manager: Any, several: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from hvdlm_auto import measure

    monkeypatch.setattr(measure, "LARGE", measure.LARGE[:2])  # larger ones take seconds on cores that ranks share
    group = several.group(range(several.size))
    lines = measure.measure_wire(["all_reduce float32", "all_gather uint8"], group, several)
    values = [[line.latency, line.per_byte] for line in lines.values()]
    assert all(latency > 0 and per_byte >= 0 for latency, per_byte in values)
    assert several.gather_objects(values) == [values] * several.size


# The controller, with given seconds in place of measured ones


class Machine:
    """What is measured: the wire's seconds for a byte, and by method the seconds of a step and of waiting in it."""

    def __init__(self, manager: Any, world: World, monkeypatch: pytest.MonkeyPatch, gap: float = 0.001) -> None:
        from hvdlm_auto import measure

        self.per_byte = 1e-9
        self.seconds: dict[str, float] = {}
        self.waits: dict[str, float] = {}
        self.measured = 0
        self._manager, self._world = manager, world
        self._options = CommunicationConfig(auto=True, max_loss_gap=gap, bucket_bytes=4000)
        monkeypatch.setattr(measure, "forward_seconds", lambda *_: 0.05)
        monkeypatch.setattr(measure, "copy_cost", lambda layout: 0.0)
        monkeypatch.setattr(measure, "measure_wire", Machine.wire)
        Machine.of[world.rank] = self

    of: ClassVar[dict[int, Machine]] = {}

    @staticmethod
    def wire(kinds: Any, group: Any, world: World) -> dict[str, Any]:
        """Return the lines, in place of ``measure_wire``."""
        from hvdlm_auto.decisions import Line

        own = Machine.of[world.rank]
        own.measured += 1
        return {kind: Line(1e-5, own.per_byte) for kind in kinds}

    def start(self, state: Any = None, step: int = 0) -> Any:
        """Return a controller at the start of a run, or of one that resumes from an exchange's state."""
        from hvdlm_auto.controller import Controller

        exchange = make(self._manager, self._world)
        if state is not None:
            exchange.load_state(state)
        config = Config(framework=FRAMEWORK, communication=self._options)
        run = SimpleNamespace(world=self._world, mesh=Mesh(self._world.size, 1, 1), config=config, exchange=exchange)
        run.trainable = run.task = None
        run.start_step = step
        controller: Any = Controller(run)  # type: ignore[arg-type]
        controller.exchange = exchange
        controller.begin(resumed=state is not None)
        return controller

    def steps(self, controller: Any, first: int, last: int) -> None:
        """Let steps ``first`` to ``last``, exclusive, take their method's seconds."""
        for step in range(first, last):
            controller.exchange.begin(step)
            name = controller.log.active
            seconds, waits = self.seconds.get(name, 0.2), self.waits.get(name, 0.0)
            controller.step_ended(step + 1, StepResult(1.0, 12288.0, 2.0, waits), seconds)


@pytest.fixture
def machine(manager: Any, several: World, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Machine]:
    return lambda **options: Machine(manager, several, monkeypatch, **options)


def methods(controller: Any) -> list[tuple[int, str]]:
    return [(decision.step, decision.method) for decision in controller.log.decisions]


def test_a_fast_wire_keeps_dense_sums(machine: Any) -> None:
    own = machine()
    controller = own.start()
    own.steps(controller, 0, 201)
    assert methods(controller) == [(0, "dense")] and own.measured == 1


def test_a_trial_keeps_what_is_fastest_in_training(machine: Any, several: World) -> None:
    own = machine()
    own.per_byte = 1e-5 / several.size
    controller = own.start()
    turns = controller.log.trial.turns
    assert set(turns) <= {"fp16", "bf16", "int8", "dense", "dense x4", "dense whole"} and len(set(turns)) > 1
    slowest = controller.log.decisions[0].method  # what was predicted to be the fastest isn't
    own.seconds = {slowest: 0.9}
    own.steps(controller, 0, 3)
    resumed = own.start(controller.exchange.state(), 3)
    for one in (controller, resumed):
        own.steps(one, 3, 6 * len(turns) + 1)
        expected = [(6 * number, turn) for number, turn in enumerate(turns)]
        assert methods(one)[:-1] == expected and methods(one)[-1][0] == 6 * len(turns)
        assert methods(one)[-1][1] != slowest and one.log.settled
    assert methods(resumed) == methods(controller) and own.measured == 1


def test_a_wire_that_becomes_slower_or_faster_is_noticed(machine: Any) -> None:
    own = machine(gap=0.0)  # between lossless methods, which no trial compares
    controller = own.start()
    own.steps(controller, 0, 70)
    own.per_byte, own.waits = 1e-3, dict.fromkeys(("dense", "dense x4", "dense whole"), 0.15)
    own.steps(controller, 70, 271)
    assert own.measured == 2 and {name for _, name in methods(controller)} == {"dense"}
    own.per_byte, own.waits = 1e-9, {}
    own.steps(controller, 271, 400)
    assert own.measured == 3


def test_a_wrong_prediction_has_methods_tried_once(machine: Any) -> None:
    own = machine()
    controller = own.start()
    own.waits = dict.fromkeys(("dense", "fp16", "bf16", "int8"), 0.1)
    own.seconds = {"dense": 0.3, "fp16": 0.28, "bf16": 0.28, "int8": 0.25}
    own.steps(controller, 0, 400)
    tried = [name for _, name in methods(controller)]
    assert tried[0] == "dense" and len(set(tried)) > 1 and controller.log.settled
    assert methods(controller)[-1][0] < 200 and own.measured <= 4


def test_a_lossy_method_has_the_wire_measured_now_and_then(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hvdlm_auto import decisions, periods

    monkeypatch.setattr(decisions, "CLOSE", 1.0)
    monkeypatch.setattr(periods, "RETRY", 100)
    own = machine()
    own.per_byte = 1e-3
    controller = own.start()
    (first,) = methods(controller)
    own.waits = {first[1]: 5.0, "dense": 0.0}
    own.seconds = {first[1]: 10.0}
    own.steps(controller, 0, 60)
    own.per_byte = 1e-9
    own.steps(controller, 60, 260)
    assert first[1] in ("fp16", "bf16", "int8") and methods(controller)[-1][1] == "dense"


def test_a_method_whose_residual_grows_is_given_up(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hvdlm_auto import decisions

    monkeypatch.setattr(decisions, "CLOSE", 1.0)
    own = machine(gap=1.0)
    own.per_byte = 1e-2
    controller = own.start()
    ((_, name),) = methods(controller)
    residuals = iter([1.0, 2.0, 0.9, 3.5, 3.7, 3.7])
    controller.exchange.residual = lambda: next(residuals)
    own.waits = {name: 0.0}
    controller._remeasure = lambda reason: False  # what the residual decides, only
    own.steps(controller, 0, 260)
    assert methods(controller) == [(0, name), (250, "dense")]
    assert controller.log.banned == [name] and "error feedback" in controller.log.decisions[-1].reason
