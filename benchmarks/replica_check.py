"""Cost of the checks before a checkpoint is published (finite values, equal replicas): saves with and without them.

    python benchmarks/replica_check.py [torch tensorflow] [--rounds 20] [--block 10] [--width 256] [--short]

Two data-parallel ranks train; saves with and without the checks take turns, one in every block of steps. The first
figure is the processor time that a save takes of the thread that trains, with the checks divided by without them: they
work in the background, on the copy that a save makes anyway. The second is the processor time that they take there, on
the slowest rank, divided by the time of 500 steps, the default interval of saves: no run becomes slower by more than
this.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from harness import Bar, emit, flags, make_parser, parse, report, report_ratio, run_worker

from hvdlm import hookimpl
from hvdlm.training import loop

RANKS, INTERVAL = 2, 500
MAIN_THREAD, SHARE = Bar(at_most=1.05), Bar(at_most=0.01)
FULL = {"rounds": 20, "block": 10, "layers": 4, "width": 256}
SHORT = {"rounds": 2, "block": 3, "layers": 1, "width": 32}


class Turns:
    """Saves in turns with and without the checks; an event plugin that notes the seconds of steps.

    Attributes:
        main_seconds: processor seconds of each save in the thread that trains, with checks (True) and without.
        check_seconds: processor seconds of the checks of each save that has them.
        step_seconds: seconds of each step.
    """

    def __init__(self, saver: Any) -> None:
        from hvdlm.checkpoints.state_checks import Copied

        self.main_seconds: dict[bool, list[float]] = {True: [], False: []}
        self.check_seconds: list[float] = []
        self.step_seconds: list[float] = []
        self._saves = 0
        self._checks, self._plans = True, {True: None, False: None}
        self._save, self._advance, self._check = loop.save, saver.advance, Copied.check
        loop.save = self._take_turn
        saver.advance = lambda: self._timed(self._advance)
        Copied.check = lambda copied, compared: self._timed_check(copied, compared)  # type: ignore[method-assign]

    def _take_turn(self, run: Any, step: int, metrics: dict[str, Any]) -> int:
        loop.report_saved(run, run.saver.finish())
        self._checks = self._saves % 4 in (0, 3)
        self._saves += 1
        every = INTERVAL if self._checks else 0
        run.config = replace(run.config, train=replace(run.config.train, replica_check_every=every))
        run.saver._planned = self._plans[self._checks]
        self.main_seconds[self._checks].append(0.0)
        self._timed(lambda: self._save(run, step, metrics))
        self._plans[self._checks] = run.saver._planned
        return step

    def _timed(self, action: Callable[[], Any]) -> Any:
        began = time.thread_time()
        result = action()
        self.main_seconds[self._checks][-1] += time.thread_time() - began
        return result

    def _timed_check(self, copied: Any, compared: set[str]) -> str | None:
        if not self._checks:
            return None
        began = time.thread_time()
        name = self._check(copied, compared)
        self.check_seconds.append(time.thread_time() - began)
        return name

    @hookimpl
    def hvdlm_step_ended(self, seconds: float) -> None:
        """Note the seconds of a step."""
        self.step_seconds.append(seconds)


def work(o: argparse.Namespace) -> None:
    """Be a rank: train, save in turns; rank 0 emits what was measured, without the first round."""
    from hvdlm.config import Config
    from hvdlm.training import run
    from hvdlm.training.signals import Signals

    config = Config(framework=o.framework)
    config.model.layers, config.model.width, config.model.heads = o.layers, o.width, 4
    config.train.steps = (o.rounds + 1) * 2 * o.block
    config.train.batch_size = 4 * RANKS
    config.train.eval_every, config.train.threads = 0, 1
    config.data.validation_share = 0.01  # of the evaluation at the end, which isn't measured
    config.checkpoint.every, config.checkpoint.keep = o.block, 1
    config.log.run, config.log.overwrite = o.folder, True
    opened = run.start(run.plan(config))
    turns = Turns(opened.saver)
    opened.manager.register(turns)
    loop.train(opened, Signals(opened.world.rank))
    checks = opened.world.gather_objects(statistics.median(turns.check_seconds[1:]))
    if opened.world.rank == 0:
        emit("rounds", list(zip(turns.main_seconds[True][1:], turns.main_seconds[False][1:], strict=True)))
        emit("seconds", [max(checks), statistics.median(turns.step_seconds)])
        emit("parameters", opened.spec.parameters)
    opened.world.close()


def measure(o: argparse.Namespace, framework: str) -> None:
    """Measure a framework."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = {name: getattr(o, name) for name in FULL} | {"framework": framework, "folder": folder}
        values = run_worker("replica_check.py", RANKS, ["--work", *flags(sizes)])
    (check, step), of = values["seconds"][0], f"{framework}, {values['parameters'][0]:,} parameters, {RANKS} ranks"
    title = f"processor seconds of a save in the thread that trains, with / without checks, {of}"
    report_ratio(title, values["rounds"][0], MAIN_THREAD)
    details = f"{1000 * check:.3g} ms in each save, {1000 * step:.3g} ms a step"
    title = f"processor seconds of the checks of a save / seconds of {INTERVAL} steps, {of}"
    report(title, check / (INTERVAL * step), SHARE, details)


def main() -> int:
    """Measure each framework."""
    parser = make_parser(__doc__)
    for name in ("folder", "framework"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    o = parse(parser, FULL, SHORT)
    if o.work:
        work(o)
        return 0
    for framework in o.frameworks:
        measure(o, framework)
    return 0


if __name__ == "__main__":
    sys.exit(main())
