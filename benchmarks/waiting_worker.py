"""A rank that trains in turns: for each number of seconds read from standard input, it prints the tokens per second.

The end of standard input ends it. Its threads sleep between two turns.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.training import loop, run
from hvdlm.training.signals import Signals


class Turns:
    """An event plugin that halts training after every turn until the next one begins."""

    def __init__(self, step_tokens: int) -> None:
        self._step_tokens = step_tokens
        self._steps = 0
        self._start = 0.0
        self._end = 0.0

    @hookimpl
    def hvdlm_run_started(self) -> None:
        """Wait for the first turn."""
        print("READY", flush=True)
        self._wait()

    @hookimpl(trylast=True)
    def hvdlm_step_ended(self) -> None:
        """End the turn when its time is over."""
        self._steps += 1
        now = time.perf_counter()
        if now >= self._end:
            print(self._steps * self._step_tokens / (now - self._start), flush=True)
            self._wait()

    def _wait(self) -> None:
        line = sys.stdin.readline()
        if not line:
            os._exit(0)  # without a checkpoint or a summary
        self._steps = 0
        self._start = time.perf_counter()
        self._end = self._start + float(line)


def main() -> None:
    """Train until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--framework", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--width", type=int, required=True)
    options = parser.parse_args()
    # With a width of 128, the model of examples/shakespeare_char.yaml.
    config = Config(framework=options.framework)
    config.model.width = options.width
    config.model.bias = False
    config.train.steps = 10**9
    config.train.batch_size = 12
    config.train.threads = options.threads
    config.train.eval_every = 0
    config.checkpoint.every = 0
    with tempfile.TemporaryDirectory() as folder:
        config.log.run = folder
        config.log.overwrite = True
        opened = run.start(run.plan(config))
        opened.manager.register(Turns(config.train.batch_size * config.data.context))
        loop.train(opened, Signals(0))


if __name__ == "__main__":
    main()
