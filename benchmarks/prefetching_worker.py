"""A rank that trains examples/shakespeare_char.yaml, in turns with and without ``data.prefetch``."""

from __future__ import annotations

import argparse
import time

from harness import FOLDER, emit

from hvdlm import hookimpl, telemetry
from hvdlm.config import Config
from hvdlm.protocols.types import Batch, StepResult
from hvdlm.training import batches, loop, run
from hvdlm.training.signals import Signals


class Turns:
    """An event plugin that switches the thread on and off after every ``block`` steps.

    ``rounds``: (seconds with it, seconds without) of a block; ``shares``: (with, without) spent waiting for data.
    """

    def __init__(self, opened: run.Run, block: int) -> None:
        self._group = opened.world.group(range(opened.world.size))
        self._block = block
        self._seconds: list[float] = []
        self._waited: list[float] = []
        self._data_seconds = self._began = 0.0
        self.ahead = True
        self.rounds: list[tuple[float, ...]] = []
        self.shares: list[tuple[float, ...]] = []

    @hookimpl(trylast=True)
    def hvdlm_step_ended(self, step: int, result: StepResult) -> None:
        """Change after each block; the first step of a block, whose batch isn't ready, doesn't count."""
        if step % self._block == 1:
            self._group.barrier()
            self._data_seconds, self._began = 0.0, time.perf_counter()
            return
        self._data_seconds += result.data_seconds
        if step % self._block:
            return
        self._seconds.append(time.perf_counter() - self._began)
        self._waited.append(self._data_seconds / self._seconds[-1])
        if not self.ahead:
            self.rounds.append(tuple(self._seconds))
            self.shares.append(tuple(self._waited))
            self._seconds, self._waited = [], []
        self.ahead = not self.ahead


def main() -> None:
    """Train in turns; rank 0 emits the rounds, and the shares of all ranks: [rank][round][with, without]."""
    parser = argparse.ArgumentParser()
    for name in ("framework", "text", "folder"):
        parser.add_argument(f"--{name}")
    for name in ("rounds", "block", "layers", "width"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--delay", type=float, help="seconds added to reading a batch")
    o = parser.parse_args()
    config = Config.load(FOLDER.parent / "examples" / "shakespeare_char.yaml")
    config.framework, config.data.path, config.data.cache = o.framework, o.text, o.folder
    config.train.steps, config.train.eval_every, config.train.threads = 2 * o.rounds * o.block, 0, 1
    config.model.layers, config.model.width = o.layers, o.width
    config.checkpoint.every, config.log.progress = 0, False
    config.data.validation_share = 0.01  # of the evaluation at the end, which isn't measured
    config.log.run, config.log.overwrite = f"{o.folder}/run", True
    opened = run.start(run.plan(config))
    turns, take, rows = Turns(opened, o.block), batches.Batches.take, opened.task.rows

    def slow_rows(first: int, last: int) -> Batch:
        time.sleep(o.delay)
        return rows(first, last)

    def take_in_turns(self: batches.Batches, row: int, left: int) -> list[Batch]:
        return take(self, row, left) if turns.ahead else batches.micro_batches(opened, row)

    if o.delay:
        opened.task.rows = slow_rows  # type: ignore[method-assign]
    batches.Batches.take = take_in_turns  # type: ignore[method-assign]
    for plugin in (*telemetry.default_plugins(opened.config), turns):
        opened.manager.register(plugin)
    loop.train(opened, Signals(opened.world.rank))
    shares = opened.world.gather_objects(turns.shares)
    if opened.world.rank == 0:
        emit("rounds", turns.rounds)
        emit("shares", shares)
    opened.world.close()


if __name__ == "__main__":
    main()
