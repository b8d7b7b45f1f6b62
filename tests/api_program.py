"""A program that uses the Python API, on one rank or several: ``api_program.py ACTION FOLDER --framework NAME``.

Every rank writes what it got to ``FOLDER/result-RANK.json``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import hvdlm
from hvdlm import telemetry
from hvdlm.diagnostics import watchdog
from hvdlm.io import file_lock, launcher_env

RANK = launcher_env.rank_for_messages()
HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
OPTIONS: dict[str, Any] = {
    "model": {"layers": 1, "width": 32, "heads": 2},
    "data.context": 32,
    "data.validation_share": 0.0044,
    "train": {"batch_size": 8, "steps": 8, "eval_every": 4, "warmup": 2, "threads": 1},
    "log": {"every": 1, "progress": False, "tensorboard": False},
}


def config(folder: Path, framework: str, name: str, **options: Any) -> hvdlm.Config:
    """Return the configuration of a small run in ``folder/name``."""
    return hvdlm.Config.load(OPTIONS, {"framework": framework, "log.run": folder / name}, options)


def process_state() -> list[Any]:
    """Return what a training must leave as it was."""
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    blocked = sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, [])))
    threads = sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("hvdlm"))
    descriptors = [
        os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{n}")
    ]
    locks = [name for name in descriptors if name.endswith("/.lock")]
    handlers = [repr(signal.getsignal(number)) for number in HANDLED]
    return [handlers, wakeup, blocked, threads, locks, repr(sys.excepthook)]


def trainings(folder: Path, framework: str) -> Any:
    """Train twice with one seed, then evaluate and generate with the last run."""
    before = process_state()
    results = [hvdlm.train(config(folder, framework, name)) for name in ("first", "second")]
    restored = process_state() == before
    with hvdlm.load(results[-1].run) as run:
        text, metrics, step = run.generate("The ", 20), run.evaluate(), run.step
        again = run.generate("The ", 20)
    fields = ("status", "reason", "steps", "val_loss", "best_val_loss")
    reached = [[getattr(result, field) for field in fields] for result in results]
    checkpoints = [str(result.checkpoint) for result in results]
    return {"restored": restored, "reached": reached, "checkpoints": checkpoints, "text": [text, again],
            "metrics": metrics, "step": step}  # fmt: skip


def failures(folder: Path, framework: str) -> Any:
    """Fail in three ways that all ranks share, then train."""
    file_lock.STALE = 1.0  # a second rank waits this long for the lock of a first that has failed already
    messages = []
    for options in (
        {"train.steps": 0},
        {"data.path": str(folder / "none.txt")},
        {"train.learning_rate": 1e18, "train.clip": 0},
    ):
        try:
            hvdlm.train(config(folder, framework, f"failed-{len(messages)}", **options))
        except (hvdlm.HvdlmError, hvdlm.RankError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    result = hvdlm.train(config(folder, framework, "last"))
    refused = []
    with hvdlm.load(result.run) as run:
        for action in (
            lambda: run.generate("\u65e5"),
            lambda: run.generate("The ", temperature=float("nan")),
            *([] if launcher_env.launch_shape()[1] == 1 else [run.evaluate if RANK else lambda: run.generate("The ")]),
        ):
            try:
                action()
            except hvdlm.HvdlmError as error:
                refused.append(str(error))
        text = run.generate("The ", 5)
    return {"messages": messages, "status": result.status, "refused": refused, "text": text}


def alone(folder: Path, framework: str) -> Any:
    """Fail on rank 1 only, from a thread that the other ranks' program knows nothing of."""
    path = folder / "missing.txt" if RANK == 1 else "embedded"
    hvdlm.train(config(folder, framework, "run", **{"data.path": str(path)}))
    raise AssertionError("a rank that failed alone let the others go")


class Interrupts:
    """Event plugin that sends this process a SIGINT, and another one while the step waits."""

    def __init__(self, second: bool) -> None:
        self._second = second

    @hvdlm.hookimpl
    def hvdlm_step_ended(self, step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            if self._second:
                threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT)).start()
                time.sleep(60)


def interrupted(folder: Path, framework: str) -> Any:
    """Stop by a signal and resume; train in a thread; end at once by a second signal."""
    settings = {"train.steps": 100_000, "log.run": folder / "run"}
    default = telemetry.default_plugins
    telemetry.default_plugins = lambda config: [*default(config), Interrupts(second=False)]
    stopped = hvdlm.train(config(folder, framework, "run", **settings))
    telemetry.default_plugins = default
    resumed = config(folder, framework, "run", **{"checkpoint.resume": "auto", "train.steps": stopped.steps + 2})
    results: list[hvdlm.Result] = []
    other = threading.Thread(target=lambda: results.append(hvdlm.train(resumed)))
    other.start()
    deadline = time.monotonic() + 60
    while other.is_alive() and not watchdog._watched.locked() and time.monotonic() < deadline:
        time.sleep(0.001)
    try:
        hvdlm.train(config(folder, framework, "second"))
        refused = ""
    except hvdlm.HvdlmError as error:
        refused = str(error)
    other.join(120)
    before = process_state()
    telemetry.default_plugins = lambda config: [*default(config), Interrupts(second=True)]
    try:
        hvdlm.train(config(folder, framework, "third", **{"train.steps": 100_000}))
        ended = "by itself"
    except KeyboardInterrupt:
        ended = "at once"
    return {
        "stopped": [stopped.status, stopped.reason, stopped.steps],
        "resumed": [results[0].status, results[0].steps],
        "refused": refused,
        "ended": ended,
        "restored": process_state() == before,
    }


if __name__ == "__main__":
    action, target, _, chosen = sys.argv[1:]
    actions = {"trainings": trainings, "failures": failures, "alone": alone, "interrupted": interrupted}
    content = actions[action](Path(target), chosen)
    (Path(target) / f"result-{RANK}.json").write_text(json.dumps(content))
