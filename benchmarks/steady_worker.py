"""One rank of a run that trains until it is ended, and counts its steps where the benchmark can read them."""

from __future__ import annotations

import argparse
import mmap
import os
import struct
from pathlib import Path

from hvdlm import hookimpl, telemetry
from hvdlm.config import Config
from hvdlm.training import loop, run
from hvdlm.training.signals import Signals


class Counter:
    """An event plugin: keeps (process id, steps done) in a file of 16 bytes."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(16))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 16)

    @hookimpl
    def hvdlm_step_ended(self, step: int) -> None:
        """Count."""
        self._memory[:] = struct.pack("<qq", os.getpid(), step)


def main() -> None:
    """Train without end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--framework")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rows", type=int)
    o = parser.parse_args()
    config = Config(framework=o.framework)
    config.log.run, config.log.overwrite, config.log.progress = str(o.folder / "run"), True, False
    config.train.steps, config.train.eval_every, config.checkpoint.every = 10**7, 0, 0
    config.train.threads, config.model.bias, config.train.batch_size = 1, False, o.rows
    opened = run.start(run.plan(config))
    for plugin in (*telemetry.default_plugins(opened.config), Counter(o.folder / f"count-{opened.world.rank}")):
        opened.manager.register(plugin)
    loop.train(opened, Signals(opened.world.rank))


if __name__ == "__main__":
    main()
