"""A rank that trains until it is killed, and counts its steps in a file that the benchmark reads."""

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
    """An event plugin that keeps (process id, steps done) in a file of 16 bytes."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(16))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 16)

    @hookimpl
    def hvdlm_step_ended(self, step: int) -> None:
        """Write the number of steps done."""
        self._memory[:] = struct.pack("<qq", os.getpid(), step)


def main() -> None:
    """Train until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--framework")
    parser.add_argument("--folder", type=Path)
    for name in ("rows", "layers", "width"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--config", type=Path, help="trains this file's model, on --text")
    parser.add_argument("--text", type=Path)
    o = parser.parse_args()
    config = Config()
    if o.config:
        config = Config.load(o.config)
        config.data.path, config.data.cache = str(o.text), str(o.folder)
    config.framework = o.framework
    config.log.run = str(o.folder / "run")
    config.log.overwrite = True
    config.log.progress = False
    config.train.steps = 10**7
    config.train.eval_every = 0
    config.train.threads = o.threads
    config.train.batch_size = o.rows
    config.checkpoint.every = 0
    config.model.layers, config.model.width, config.model.bias = o.layers, o.width, False
    opened = run.start(run.plan(config))
    for plugin in (*telemetry.default_plugins(opened.config), Counter(o.folder / f"count-{opened.world.rank}")):
        opened.manager.register(plugin)
    loop.train(opened, Signals(opened.world.rank))


if __name__ == "__main__":
    main()
