"""Computation and collectives side by side: two streams of tasks that slow each other down."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """One segment's pass: computation with collectives before (which it needs), within, and after it.

    Attributes:
        seconds: of computation.
        blocking: of collectives that it waits for.
        gathers: of collectives before it, started with the task before it.
        then: of collectives that are started when it ends.
    """

    seconds: float
    blocking: float
    gathers: float = 0.0
    then: float = 0.0


@dataclass(frozen=True)
class Slowdown:
    """Factors on the seconds of computation and of a collective while both are under way."""

    computation: float = 1.0
    collective: float = 1.0


@dataclass(frozen=True)
class Ran:
    """What tasks took.

    Attributes:
        end: of the computation.
        waited: for gathers.
        exposed: communication after the computation.
        hidden: communication behind it.
        then: seconds of each task's collectives, from when the one before has ended.
    """

    end: float
    waited: float
    exposed: float
    hidden: float
    then: tuple[float, ...]


def run(tasks: Sequence[Task], slowdown: Slowdown) -> Ran:
    """Run tasks on two streams: computation in their order, and collectives in the order in which they are started."""
    if not any(task.gathers or task.then for task in tasks):  # most passes; a search predicts thousands of layouts
        return Ran(sum(task.seconds + task.blocking for task in tasks), 0.0, 0.0, 0.0, (0.0,) * len(tasks))
    streams, waited, sent = _Streams(slowdown), 0.0, 0.0
    numbers, arrival = [], streams.start(tasks[0].gathers) if tasks and tasks[0].gathers else None
    for index, task in enumerate(tasks):
        if arrival is not None:
            waited += streams.wait_for(arrival)
            arrival = None
        if index + 1 < len(tasks) and tasks[index + 1].gathers:
            arrival = streams.start(tasks[index + 1].gathers)
        streams.compute(task.seconds)
        streams.block(task.blocking)
        numbers.append(streams.start(task.then) if task.then else None)
        sent += task.then + task.gathers
    end = streams.now
    exposed = streams.finish()
    then = tuple(0.0 if number is None else streams.seconds[number] for number in numbers)
    return Ran(end, waited, exposed, max(0.0, sent - exposed - waited), then)


class _Streams:
    """The clock of the computation, and the collectives under way, first to last.

    Attributes:
        now: seconds since the start.
        seconds: that each collective took, in the order in which they were started.
    """

    def __init__(self, slowdown: Slowdown) -> None:
        self.now = 0.0
        self.seconds: list[float] = []
        self._slowdown = slowdown
        self._left: deque[float] = deque()  # seconds of each collective under way, without slowdown
        self._done = 0

    def start(self, seconds: float) -> int:
        """Start a collective after those under way; return its number."""
        self._left.append(seconds)
        self.seconds.append(0.0)
        return len(self.seconds) - 1

    def compute(self, seconds: float) -> None:
        """Compute beside the collectives."""
        own, other = self._slowdown.computation, self._slowdown.collective
        while seconds > 0 and self._left:
            lasts = self._left[0] * other
            if seconds * own < lasts:
                self._advance(seconds * own, seconds * own / other)
                return
            self._advance(lasts, self._left[0])
            seconds -= lasts / own
        self.now += max(0.0, seconds)

    def block(self, seconds: float) -> None:
        """Wait for a collective of another kind, beside those under way."""
        while seconds > 0 and self._left:
            lasts = self._left[0]
            if seconds < lasts:
                self._advance(seconds, seconds)
                return
            self._advance(lasts, lasts)
            seconds -= lasts
        self.now += seconds

    def wait_for(self, number: int) -> float:
        """Wait until a collective has ended; return the seconds."""
        began = self.now
        while self._done <= number:
            self._advance(self._left[0], self._left[0])
        return self.now - began

    def finish(self) -> float:
        """Wait until all have ended; return the seconds."""
        return self.wait_for(len(self.seconds) - 1) if self.seconds else 0.0

    def _advance(self, seconds: float, progress: float) -> None:
        """Let ``seconds`` pass, in which the first collective does ``progress`` of its seconds."""
        self.now += seconds
        self.seconds[self._done] += seconds
        if progress >= self._left[0]:
            self._left.popleft()
            self._done += 1
        else:
            self._left[0] -= progress
