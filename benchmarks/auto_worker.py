"""A rank that trains with communication.auto, and then by every method in turns; rank 0 emits the seconds of a step."""

from __future__ import annotations

import argparse
import importlib
import statistics
from typing import Any

from harness import emit

from hvdlm import hookimpl, telemetry
from hvdlm.config import Config
from hvdlm.training import loop, run
from hvdlm.training.signals import Signals

BLOCK = 3  # steps of a turn that are timed
UNTIMED, FIRST = 1, 2  # steps before them; in the first turn of a method, in which TensorFlow builds its graph
TRIED, WITHIN = 3, 1.15  # rounds after which only methods stay whose median is within this factor of the best one's


class Turns:
    """An event plugin: when the run has decided, its choice and every method of at most the same gap take turns."""

    def __init__(self, opened: run.Run, rounds: int) -> None:
        self._exchange: Any = opened.exchange
        self._world = opened.world
        self._rounds = rounds
        self._pending: list[tuple[str, str]] = []
        self._timed: list[float] = []
        self._left = 0
        self.chosen = ""
        self.seconds: dict[str, list[float]] = {}

    @hookimpl
    def hvdlm_run_started(self, run: Any) -> None:
        """Keep the run, which ends after the last turn."""
        self._run = run

    @hookimpl(trylast=True)
    def hvdlm_step_ended(self, step: int, seconds: float) -> None:
        """Time the step; begin the next turn where one is over. Ranks count steps alike."""
        log = self._exchange.log
        if not self.chosen:
            if log.trial is not None or step < FIRST:
                return
            self._begin()
        self._left -= 1
        if 0 <= self._left < BLOCK:
            self._timed.append(seconds)
        if self._left <= 0:
            self._next()

    def _begin(self) -> None:
        log = self._exchange.log
        importlib.import_module("hvdlm_auto.periods").INTERVAL = 10**9  # from here on, nothing is decided
        self.chosen = log.method(self._exchange.next_step)
        self._methods = [candidate.name for candidate in log.candidates]
        self.seconds = {name: [] for name in ("auto", *self._methods)}
        self._round = 0
        self._current = ""

    def _take_turns(self) -> None:
        """Begin a round; the first one builds graphs."""
        if self._round == 1 + TRIED:  # what takes twice the time would be measured the longest
            medians = {name: statistics.median(self.seconds[name][1:]) for name in self._methods}
            near = [name for name in self._methods if medians[name] <= WITHIN * min(medians.values())]
            self._methods = self._world.broadcast_object(near)
        turns = [("auto", self.chosen), *((name, name) for name in self._methods)]
        self._pending = turns[:: 1 if self._round % 2 == 0 else -1]
        self._round += 1

    def _next(self) -> None:
        if self._current and self._timed:
            self.seconds[self._current].append(sum(self._timed) / len(self._timed))
        self._timed = []
        if not self._pending and self._round <= self._rounds:
            self._take_turns()
        if not self._pending:
            self._run.stop("measured")
            self._left = 10**9
            return
        self._current, method = self._pending.pop(0)
        self._exchange.log.add(self._exchange.next_step, method, "benchmark")
        self._left = (FIRST if self._round == 1 else UNTIMED) + BLOCK


def main() -> None:
    """Train until all turns are over."""
    parser = argparse.ArgumentParser()
    for name in ("framework", "folder"):
        parser.add_argument(f"--{name}")
    for name in ("rounds", "layers", "width", "context", "rows"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--gap", type=float)
    o = parser.parse_args()
    config = Config(framework=o.framework)
    config.train.steps, config.train.eval_every, config.train.threads, config.train.batch_size = 10**6, 0, 1, o.rows
    config.model.layers, config.model.width, config.model.heads, config.model.bias = o.layers, o.width, 6, False
    config.data.context, config.data.validation_share = o.context, 0.01
    config.checkpoint.every, config.log.tensorboard = 0, False
    config.communication.auto, config.communication.max_loss_gap = True, o.gap
    config.log.run, config.log.overwrite = o.folder, True
    opened = run.start(run.plan(config))
    turns = Turns(opened, o.rounds)
    for plugin in (*telemetry.default_plugins(opened.config), turns):
        opened.manager.register(plugin)
    loop.train(opened, Signals(opened.world.rank))
    if opened.world.rank == 0:
        emit("chosen", turns.chosen)
        emit("seconds", {name: values[1:] for name, values in turns.seconds.items()})
    opened.world.close()


if __name__ == "__main__":
    main()
