"""A rank on which hvdlm's loop and a loop written by hand take turns in one process; rank 0 emits the seconds."""

from __future__ import annotations

import argparse
import importlib
import time
from typing import Any

from harness import emit

from hvdlm import hookimpl, telemetry
from hvdlm.config import Config
from hvdlm.training import loop, run
from hvdlm.training.signals import Signals


class Turns:
    """An event plugin: after every ``block`` steps of hvdlm's loop, the plain loop does as many."""

    def __init__(self, opened: run.Run, plain: Any, block: int) -> None:
        self._group = opened.world.group(range(opened.world.size))
        self._plain = plain
        self._block = block
        self._began = 0.0
        self.rounds: list[tuple[float, float]] = []

    @hookimpl
    def hvdlm_run_started(self) -> None:
        """Start the clock."""
        self._group.barrier()
        self._began = time.perf_counter()

    # Last of all plugins, so that the time of the others counts as hvdlm's.
    @hookimpl(trylast=True)
    def hvdlm_step_ended(self, step: int) -> None:
        """Give the plain loop its turn after each block."""
        if step % self._block:
            return
        hvdlm_seconds = time.perf_counter() - self._began
        self._group.barrier()
        began = time.perf_counter()
        for _ in range(self._block):
            self._plain.step()
        self.rounds.append((hvdlm_seconds, time.perf_counter() - began))
        self._group.barrier()
        self._began = time.perf_counter()


def check_same_model(opened: run.Run, plain: Any) -> None:
    """Check that the plain loop computes the loss of a batch as hvdlm does, before either has trained."""
    batch = opened.task.rows(*opened.rows)
    loss_sum, tokens = opened.trainable.eval_step(batch)
    loss = plain.loss_of(batch.inputs, batch.targets)
    if abs(loss - loss_sum / tokens) > 1e-4:
        raise RuntimeError(f"the loops have different models: hvdlm's loss is {loss_sum / tokens}, the other's {loss}")


def main() -> None:
    """Train in turns."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--framework")
    parser.add_argument("--folder", help="of the run")
    for name in ("rounds", "block", "rows", "threads", "layers", "width"):
        parser.add_argument(f"--{name}", type=int)
    o = parser.parse_args()
    config = Config(framework=o.framework)
    config.train.steps = o.rounds * o.block
    config.train.eval_every = 0
    config.data.validation_share = 0.01  # of the evaluation at the end, which isn't measured
    config.train.threads = o.threads
    config.train.batch_size = o.rows
    config.checkpoint.every = 0
    config.model.layers, config.model.width, config.model.bias = o.layers, o.width, False
    config.log.run = o.folder
    config.log.overwrite = True
    opened = run.start(run.plan(config))
    plain = importlib.import_module(f"plain_{o.framework}").PlainLoop(opened)
    check_same_model(opened, plain)
    turns = Turns(opened, plain, o.block)
    for plugin in (*telemetry.default_plugins(opened.config), turns):
        opened.manager.register(plugin)
    loop.train(opened, Signals(opened.world.rank))
    if opened.world.rank == 0:
        emit("rounds", turns.rounds)
    opened.world.close()


if __name__ == "__main__":
    main()
