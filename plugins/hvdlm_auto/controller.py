"""Decides, on all ranks alike, by which method gradients are summed: before the first step, and on changes.

Ranks agree by host-side messages before the first step, at the end of a trial's turns, and every ``INTERVAL`` steps:
the steps between cost nothing.
"""

from __future__ import annotations

import math
import time
from collections import deque
from statistics import median
from typing import Any

from hvdlm.protocols.types import StepResult
from hvdlm.training.run import Run
from hvdlm_auto import measure, periods
from hvdlm_auto.decision_log import Decision, DecisionLog, Trial
from hvdlm_auto.decisions import Backward, Choice, cheapest, choose, predict, wire_changed
from hvdlm_auto.exchange import AutomaticExchange
from hvdlm_auto.layouts import DENSE, elements_of
from hvdlm_auto.losses import TABLE

_MIN = 1e-3  # seconds: shorter steps are compared as if they took so long
_UNKNOWN = 1e9  # seconds of a turn of which a resumed run has timed nothing


class Controller:
    """The decisions of one run on this rank."""

    def __init__(self, run: Run) -> None:
        assert isinstance(run.exchange, AutomaticExchange)
        self._run = run
        self._exchange = run.exchange
        self._group = run.world.group(run.mesh.group("data", run.world.rank))
        self._steps: deque[tuple[int, float, float, float]] = deque(maxlen=2 * periods.INTERVAL)
        self._untimed_until = 0  # the first step whose seconds count

    @property
    def log(self) -> DecisionLog:
        """The state that checkpoints keep."""
        return self._exchange.log

    # Before the first step

    def begin(self, resumed: bool) -> None:
        """Decide, or replay the decisions of the checkpoint where its ranks and wire are the same. All ranks call."""
        about = self._run.world.broadcast_object(self._about())
        start = self._run.start_step
        self._exchange.next_step = start
        self._untimed_until = start + periods.UNSTEADY
        if self.log.decisions and self.log.about == about:
            decided = self.log.decisions[-1]
            self._say(f"resumes with {decided.method}, decided for step {decided.step + 1}, without measuring")
            return
        if resumed:
            self._say("measures anew, since the checkpoint has no decisions for these ranks, transport and limits")
        self._exchange.log = DecisionLog(about=about, active=self._exchange.log.active)
        self._measure()
        self._decide(self._choice())

    def _about(self) -> dict[str, Any]:
        world, config = self._run.world, self._run.config
        return {
            "ranks": world.size,
            "ranks_of_host": world.local_size,
            "transport": world.transport,
            "framework": config.framework,
            "max_loss_gap": config.communication.max_loss_gap,
            "bucket_bytes": config.communication.bucket_bytes,
        }

    def _gaps(self) -> dict[str, float]:
        """Return the compressors that the limit allows, with their gaps."""
        limit = self._run.config.communication.max_loss_gap
        return {name: entry.gap for name, entry in TABLE.items() if entry.gap <= limit}

    def _measure(self) -> None:
        """Measure everything. All ranks call."""
        run, log, began = self._run, self.log, time.perf_counter()
        layout, rank, data = self._exchange.layout, run.mesh.coordinates(run.world.rank)["data"], run.mesh.data
        train = run.config.train
        rows = train.micro_batch_size or train.batch_size // data
        forward = measure.forward_seconds(run.trainable, run.task, rank, data, rows)
        computed = {name: measure.compressor_cost(self._exchange, name) for name in self._gaps()}
        copied = measure.copy_cost(layout)
        own = {"forward": forward, "copied": copied, "computed": {n: c.to_json() for n, c in computed.items()}}
        messages = run.world.gather_objects(own)  # the slowest rank counts, in each
        log.forward = max(message["forward"] for message in messages)
        seconds = {
            name: [max(message["computed"][name][i] for message in messages) for i in (0, 1)] for name in computed
        }
        copied = max(message["copied"] for message in messages)
        log.collectives = measure.collectives_of(layout, run.config.communication.bucket_bytes, computed)
        merged = {name: [copied, copied] for name in log.collectives if name != DENSE}
        log.computed = {DENSE: [0.0, 0.0]} | merged | seconds
        log.step = self._passes() * (1 + self._backward_factor()) * log.forward
        self._measure_wire()
        self._say(f"measured in {time.perf_counter() - began:.1f} s: {self._described()}")

    def _measure_wire(self) -> None:
        """Measure the collectives that the methods use, and what the methods take with them. All ranks call."""
        log = self.log
        kinds = dict.fromkeys(k for buckets in log.collectives.values() for sent in buckets for k, _, _ in sent)
        log.wire = measure.measure_wire(kinds, self._group, self._run.world)
        self._price()

    def _price(self) -> None:
        log = self.log
        log.measured = self._exchange.next_step
        log.candidates = measure.candidates_of(
            self._exchange.layout, log.collectives, log.computed, self._gaps(), log.wire
        )

    def _passes(self) -> int:
        """Return the micro-batches of a step."""
        train = self._run.config.train
        rows = train.batch_size // self._run.mesh.data
        return rows // (train.micro_batch_size or rows)

    def _backward_factor(self) -> float:
        """Return the seconds of a backward pass, in forward passes: products of inputs' and of weights' gradients."""
        return 3.0 if self._run.config.train.activation_checkpointing else 2.0

    def _backward(self) -> Backward:
        """Return the backward pass that hides collectives: the last micro-batch's share of the step."""
        sizes = elements_of(self._exchange.layout)
        factor = self._backward_factor()
        seconds = self.log.step / self._passes() * factor / (1.0 + factor)
        return Backward(seconds, self.log.step, tuple(size / sum(sizes) for size in sizes))

    def _choice(self, hides: bool = True) -> Choice:
        allowed = [c for c in self.log.candidates if c.name not in self.log.banned]
        return choose(allowed, self._backward(), self._run.config.communication.max_loss_gap, hides)

    # Decisions

    def _decide(self, choice: Choice) -> None:
        """Train by the choice from the next step on, or try the methods between which measurements have to decide."""
        log, first = self.log, self._exchange.next_step
        log.trial = log.expected = None
        if choice.tried:
            turns = [*choice.tried, *reversed(choice.tried)]
            log.trial = Trial(first, periods.TURN, turns)
            self._switch(turns[0], f"{choice.reason}; tried for {periods.TURN} steps a turn: {', '.join(choice.tried)}")
        else:
            self._switch(choice.name, choice.reason)

    def _switch(self, method: str, reason: str) -> Decision:
        decision = self.log.add(self._exchange.next_step, method, reason)
        self.log.residuals.pop(method, None)
        self._untimed_until = max(self._untimed_until, decision.step + periods.UNTIMED)
        self._say(f"{method} from step {decision.step + 1} on: {reason}")
        return decision

    def rolled_back(self, step: int) -> None:
        """Forget the seconds of single steps, after a rollback to the checkpoint of ``step``."""
        self._steps.clear()
        self._untimed_until = step + periods.UNSTEADY

    def step_ended(self, step: int, result: StepResult, seconds: float) -> None:
        """Note step ``step`` (the first is 1); decide where a turn or an interval ends. All ranks call."""
        index, trial = step - 1, self.log.trial
        if index >= self._untimed_until:
            norm = result.grad_norm if not result.skipped and math.isfinite(result.grad_norm) else 0.0
            scale = self._run.config.train.batch_size * self._run.config.data.context / max(1.0, result.tokens)
            self._steps.append((index, seconds, result.comm_seconds, norm / scale))
        if trial is not None:
            if (index + 1 - trial.first) % trial.steps == 0 and index >= trial.first:
                self._end_turn(trial, index)
        elif step % periods.INTERVAL == 0:
            self._compare()

    def _end_turn(self, trial: Trial, index: int) -> None:
        """Agree on the seconds of a turn; switch to the next method, or to the fastest. All ranks call."""
        number = (index + 1 - trial.first) // trial.steps - 1
        timed = [s for i, s, _, _ in self._steps if i > index - trial.steps]
        gathered = [s for s in self._run.world.gather_objects(median(timed) if timed else None) if s is not None]
        trial.seconds.append(sum(gathered) / len(gathered) if gathered else _UNKNOWN)
        self._steps.clear()
        if number + 1 < len(trial.turns):
            self._switch(trial.turns[number + 1], f"turn {number + 2} of {len(trial.turns)} of the trial")
            return
        best, shown = self._fastest(trial)
        self.log.trial, self.log.settled = None, True
        self._switch(best, f"the fastest in training ({shown})")

    def _fastest(self, trial: Trial) -> tuple[str, str]:
        """Return the method of the least seconds, and all methods' as text."""
        seconds: dict[str, float] = {}
        for name, own in zip(trial.turns, trial.seconds, strict=True):
            seconds[name] = min(own, seconds.get(name, own))
        gaps = {candidate.name: candidate.gap for candidate in self.log.candidates}
        return cheapest(seconds, gaps), ", ".join(f"{name} {1e3 * s:.1f} ms a step" for name, s in seconds.items())

    # While training

    def _compare(self) -> None:
        """Compare the ranks' figures of the last interval with those expected. All ranks call."""
        log = self.log
        recent = list(self._steps)[-periods.INTERVAL :]
        self._steps.clear()
        own: list[Any] = [None, None, None, self._exchange.residual()]
        if recent:
            own[:3] = (median(column) for column in list(zip(*recent, strict=True))[1:])
        messages = self._run.world.gather_objects(own)
        if any(message[0] is None for message in messages):
            return
        seconds, waited, norm = (sum(m[i] for m in messages) / len(messages) for i in range(3))
        if self._residual_grows([m[3] for m in messages], norm):
            return
        own_cost = next(candidate for candidate in log.candidates if candidate.name == log.active)
        before = log.expected[1] if log.expected else max(0.0, predict(own_cost, self._backward()).added)
        log.step = max(_MIN, seconds - waited - sum(bucket.start for bucket in own_cost.buckets))
        if abs(waited - before) > periods.CHANGED * max(_MIN, seconds):
            reason = f"steps wait {1e3 * waited:.1f} ms for communication instead of {1e3 * before:.1f}"
        elif own_cost.gap and self._exchange.next_step - log.measured >= periods.RETRY:
            reason = f"{periods.RETRY} steps since the last measurement"
        else:
            log.expected = log.expected or (seconds, before)
            return
        if not self._remeasure(reason):
            log.expected = (seconds, waited)

    def _remeasure(self, reason: str) -> bool:
        """Measure the wire; decide anew where it has changed, and return whether it has. All ranks call."""
        log, before = self.log, self.log.wire
        self._measure_wire()
        changed = wire_changed(before, log.wire, periods.WIRE)
        if not changed and (log.settled or log.expected is not None):
            self._say(f"{reason}: the wire is as it was, {log.active} stays")
            return False
        self._say(f"{reason}: the wire {'has changed' if changed else 'is as it was'}, {self._described()}")
        log.settled = log.settled and not changed
        choice = self._choice(hides=changed)  # where it is as it was, the prediction was wrong
        if choice.name == log.active and not choice.tried:
            return False
        self._decide(choice)
        return True

    def _residual_grows(self, residuals: list[float | None], norm: float) -> bool:
        """Give up a method whose error feedback has grown beyond its bound; return whether it has."""
        log = self.log
        if any(residual is None for residual in residuals) or norm <= 0.0:
            return False
        ratio = sum(residual or 0.0 for residual in residuals) / norm
        name = log.active
        least = log.residuals.get(name, math.inf)
        if math.isfinite(ratio) and ratio <= periods.GROWTH * least:
            log.residuals[name] = min(least, ratio)
            return False
        log.banned.append(name)
        grown = f"{ratio:.3g} times the gradient, after {least:.3g} times"
        self._switch(DENSE, f"the error feedback of {name} is {grown}: it isn't used again")
        log.expected = None
        return True

    # Reports

    def _described(self) -> str:
        wire = "; ".join(
            f"{kind} {1e3 * line.latency:.2f} ms and {8e-6 / max(line.per_byte, 1e-15):.0f} Mbit/s"
            for kind, line in self.log.wire.items()
        )
        return f"{wire}; a step without communication {1e3 * self.log.step:.1f} ms"

    def _say(self, text: str) -> None:
        if self._run.world.rank == 0:
            print(f"hvdlm: communication.auto: {text}", flush=True)

    def summary(self) -> dict[str, Any]:
        """Return what summary.json has: the decisions with their reasons, and what was measured."""
        log = self.log
        return {
            "decisions": [{"step": d.step + 1, "method": d.method, "reason": d.reason} for d in log.decisions],
            "wire": {k: {"latency": w.latency, "seconds_per_byte": w.per_byte} for k, w in log.wire.items()},
            "max_loss_gap": self._run.config.communication.max_loss_gap,
        }
