"""From a plan to the end of its run: what the command ``train`` and the Python API share."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from hvdlm import telemetry
from hvdlm.protocols.world import World
from hvdlm.training import loop
from hvdlm.training.run import Plan, Run, build, connect
from hvdlm.training.signals import Signals


def run_training(
    plan: Plan, signals: Signals, guard: Callable[[World], AbstractContextManager[Any]], *own: object
) -> tuple[Run, dict[str, Any]]:
    """Train as planned, and return the run and its summary. All ranks call.

    ``guard`` ends the ranks where one of them fails; ``own``: event plugins of the caller.

    Raises:
        HvdlmError: bad input.
        RankError: the result is not finite, or ranks can't communicate.
    """
    connected = connect(plan)
    try:
        with connected.lock or nullcontext(), guard(connected.world):
            run = build(connected)
            for plugin in (*telemetry.default_plugins(run.config), *own):
                run.manager.register(plugin)
            summary = loop.train(run, signals)
            signals.ignore()
    finally:
        if connected.lock:
            atexit.unregister(connected.lock.release)
    return run, summary
