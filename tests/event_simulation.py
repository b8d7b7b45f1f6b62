"""Event-by-event simulation of steps: each rank is a program of its own, and a clock moves from event to event.

Written from what ``hvdlm.planning.simulator_steps`` states, but with none of its code; slow and simple.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator, Hashable, Iterator
from itertools import count

import numpy as np

from hvdlm.parallel.pipeline_schedules import make_pipeline_schedule
from hvdlm.planning.simulator_costs import StepCosts
from hvdlm.planning.simulator_failures import Failures


class Signal:
    """Something that happens once, and the programs that wait for it."""

    def __init__(self) -> None:
        self.happened = False
        self.waiting: list[Callable[[], None]] = []


Program = Generator[float | Signal, None, None]
"""A rank: yields seconds for which it is busy, or a signal that it waits for."""


class Clock:
    """Runs programs and fires signals in the order of time."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def at(self, time: float, action: Callable[[], None]) -> None:
        """Call ``action`` at ``time``."""
        heapq.heappush(self._events, (time, next(self._order), action))

    def fire(self, signal: Signal) -> None:
        """Continue the programs that wait for ``signal``."""
        signal.happened = True
        for resume in signal.waiting:
            resume()
        signal.waiting.clear()

    def start(self, program: Program) -> None:
        """Run ``program`` until it is busy or waits."""
        for request in program:
            if isinstance(request, Signal):
                if not request.happened:
                    request.waiting.append(lambda: self.start(program))
                    return
            else:
                self.at(self.now + request, lambda: self.start(program))
                return

    def run(self) -> None:
        """Handle all events."""
        while self._events:
            self.now, _, action = heapq.heappop(self._events)
            action()


class Network:
    """Collectives and messages: each begins when all have arrived and its channel is free."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._signals: dict[Hashable, Signal] = {}
        self._arrived: dict[Hashable, int] = {}
        self._free: dict[Hashable, float] = {}

    def arrive(self, name: Hashable, members: int, seconds: float, channel: Hashable = None) -> Signal:
        """Take part in the collective ``name``; return the signal of its end."""
        signal = self._signals.setdefault(name, Signal())
        self._arrived[name] = self._arrived.get(name, 0) + 1
        if self._arrived[name] == members:
            begins = self._clock.now
            if channel is not None:
                begins = max(begins, self._free.get(channel, 0.0))
                self._free[channel] = begins + seconds
            self._clock.at(begins + seconds, lambda: self._clock.fire(signal))
        return signal


class World:
    """All ranks of a run with given costs and slowness."""

    def __init__(self, costs: StepCosts, slowness: np.ndarray) -> None:
        self.costs = costs
        self.slowness = slowness
        self.clock = Clock()
        self.network = Network(self.clock)
        self.ends = np.zeros_like(slowness)

    def simulate(self) -> np.ndarray:
        """Return when each rank has ended each step, ``[steps, data, pipeline, tensor]``."""
        for index in np.ndindex(self.slowness.shape[1:]):
            self.clock.start(self._rank(*index))
        self.clock.run()
        assert (self.ends[-1] > 0).all(), "a rank is stuck"
        return self.ends

    def _rank(self, d: int, s: int, t: int) -> Program:
        costs, mesh = self.costs, self.costs.mesh
        stage = costs.stages[s]
        vote = None
        for k in range(len(self.slowness)):
            slow = self.slowness[k, d, s, t]
            yield costs.data
            sums = mesh.data > 1 and (costs.every == 1 or k < costs.warmup)
            buckets: list[Signal] = []
            yield from self._passes(k, d, s, t, buckets if sums else None)
            metrics = None
            if sums:
                metrics = self.network.arrive(("metrics", k, s, t), mesh.data, costs.metrics, ("data", s, t))
            yield from buckets
            if costs.tied and mesh.pipeline > 1 and s in (0, mesh.pipeline - 1):
                yield self.network.arrive(("tied", k, d, t), 2, costs.tied)
            if metrics:
                yield metrics
            yield self.network.arrive(("norm", k, d), mesh.pipeline * mesh.tensor, costs.norm)
            yield stage.update * slow
            if any(other.gather for other in costs.stages):
                yield self.network.arrive(("gather", k, s, t), mesh.data, stage.gather)
            last = k + 1 == len(self.slowness)
            averaged = costs.every > 1 and k >= costs.warmup and ((k + 1) % costs.every == 0 or last)
            if averaged:
                yield self.network.arrive(("round", k, s, t), mesh.data, stage.round)
            if vote:
                yield vote
            self.ends[k, d, s, t] = self.clock.now
            vote = self.network.arrive(("vote", k), mesh.size, costs.vote)

    def _passes(self, k: int, d: int, s: int, t: int, buckets: list[Signal] | None) -> Program:
        """Do all passes of a step; the signals of the buckets' sums are added to ``buckets``."""
        costs, mesh = self.costs, self.costs.mesh
        slowest = max(self.slowness[k, d, s])
        schedule = "1f1b" if mesh.pipeline == 1 else costs.schedule
        shares = costs.stages[s].shares
        virtual = mesh.pipeline * len(shares)  # stages, of which this rank has every mesh.pipeline-th
        actions = make_pipeline_schedule(schedule, s, mesh.pipeline, costs.micro_batches, len(shares))
        sent = []

        def message(kind: str, number: int, sender: int) -> Signal:
            link = (kind, sender % mesh.pipeline, d, t)
            return self.network.arrive((*link, sender, k, number), 2, costs.message, link)

        def receive(index: int) -> Signal | None:
            if index == len(actions):
                return None
            kind, number, chunk = actions[index]
            sender = chunk * mesh.pipeline + s + (-1 if kind == "forward" else 1)
            return message(kind, number, sender) if 0 <= sender < virtual else None

        arriving = receive(0)
        for index, (kind, number, chunk) in enumerate(actions):
            if arriving:
                yield arriving
            backward = kind == "backward"
            if backward and buckets is not None and costs.every_micro_batch:
                yield from buckets
            yield self.network.arrive(("pass", k, d, s, index), mesh.tensor, 0.0)
            arriving = receive(index + 1)
            stage = costs.stages[s]
            seconds = stage.forward * slowest + stage.tensor_forward
            sends = buckets is not None and (costs.every_micro_batch or number + 1 == costs.micro_batches)
            if backward:
                compute = stage.backward if stage.last_backward is None or not sends else stage.last_backward
                seconds = compute * slowest + stage.tensor_backward
            seconds *= shares[chunk]
            began, later = self.clock.now, sum(shares[chunk + 1 :])  # the backward passes of later chunks come first
            if backward and buckets is not None and sends:
                for bucket, (ready, duration) in enumerate(stage.buckets):
                    within = (ready - later) / shares[chunk]
                    if not 0 <= within <= 1:  # completed by another chunk
                        continue
                    yield max(0.0, began + within * seconds - self.clock.now)
                    name = ("bucket", k, s, t, number, bucket)
                    buckets.append(self.network.arrive(name, mesh.data, duration, ("data", s, t)))
            yield began + seconds - self.clock.now
            number_of_stage = chunk * mesh.pipeline + s
            if 0 <= number_of_stage + (-1 if backward else 1) < virtual:
                sent.append(message(kind, number, number_of_stage))
        yield from sent


def survive_step_by_step(work: float, interval: float, failures: Failures, gaps: Iterator[float]) -> dict[str, float]:
    """Return the seconds of a run with failures, ``gaps`` apart, by what they went into."""
    spent = {"saves": 0.0, "lost_work": 0.0, "restarts": 0.0, "failures": 0}
    safe, restart = 0.0, 0.0
    while True:
        left = next(gaps)
        if restart > left:
            spent["restarts"] += left
            spent["failures"] += 1
            continue
        spent["restarts"] += restart
        left -= restart
        done, clock, begun = safe, 0.0, safe
        complete_at: list[tuple[float, float, int]] = []  # when a checkpoint is complete, its work, saves until then
        saves = 0
        while clock <= left:
            if work - done <= interval * (1 + 1e-12):
                clock += work - done
                if clock <= left:
                    spent["saves"] += failures.save * saves
                    return spent
                break
            clock += interval + failures.save
            done += interval
            saves += 1
            complete_at.append((clock + failures.write, done, saves))
        kept = [(done, saves) for at, done, saves in complete_at if at <= left]
        safe, saved = kept[-1] if kept else (begun, 0)
        spent["saves"] += failures.save * saved
        spent["lost_work"] += left - (safe - begun) - failures.save * saved
        spent["failures"] += 1
        restart = failures.restart
