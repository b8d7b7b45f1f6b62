"""Runs on every rank: hvdlm's own loop and a hand-written one take turns in one process; rank 0 prints the times."""

from __future__ import annotations

import argparse
import importlib
import json
import time
from typing import Any

from hvdlm import hookimpl, telemetry
from hvdlm.config import Config
from hvdlm.training import loop, run
from hvdlm.training.signals import Signals


class Turns:
    """An event plugin: after every ``block`` steps of hvdlm's loop, the plain loop does as many."""

    def __init__(self, opened: run.Run, plain: Any, block: int) -> None:
        self._world, self._plain, self._block = opened.world, plain, block
        self._group = opened.world.group(range(opened.world.size))
        self.rounds: list[tuple[float, float]] = []
        self._mark = 0.0

    @hookimpl
    def hvdlm_run_started(self) -> None:
        """Start the clock."""
        self._group.barrier()
        self._mark = time.perf_counter()

    # Last of all plugins, so that what the others do belongs to hvdlm's time.
    @hookimpl(trylast=True)
    def hvdlm_step_ended(self, step: int) -> None:
        """Give the plain loop its turn."""
        if step % self._block:
            return
        ours = time.perf_counter() - self._mark
        self._group.barrier()
        began = time.perf_counter()
        for _ in range(self._block):
            self._plain.step()
        theirs = time.perf_counter() - began
        self.rounds.append((ours, theirs))
        self._group.barrier()
        self._mark = time.perf_counter()


def main() -> None:
    """Read the options, take turns, print one JSON line."""
    parser = argparse.ArgumentParser()
    for name, kind in (("framework", str), ("folder", str), ("rounds", int), ("block", int), ("rows", int)):
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--threads", type=int, default=None)
    o = parser.parse_args()
    config = Config(framework=o.framework)
    config.log.run, config.log.overwrite = o.folder, True
    config.train.steps, config.train.eval_every, config.checkpoint.every = o.rounds * o.block, 0, 0
    config.train.threads, config.model.bias, config.train.batch_size = o.threads, False, o.rows
    opened = run.start(run.plan(config))
    plain = importlib.import_module(f"plain_{o.framework}").PlainLoop(opened)
    turns = Turns(opened, plain, o.block)
    for plugin in (*telemetry.default_plugins(opened.config), turns):
        opened.manager.register(plugin)
    loop.train(opened, Signals(opened.world.rank))
    if opened.world.rank == 0:
        print("ROUNDS " + json.dumps(turns.rounds), flush=True)
    opened.world.close()


if __name__ == "__main__":
    main()
