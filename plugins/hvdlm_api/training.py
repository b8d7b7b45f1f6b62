"""``hvdlm.train``: what the command does, with exceptions in place of exit codes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hvdlm import hookimpl, plugins
from hvdlm.config import Config
from hvdlm.diagnostics.phases import process
from hvdlm.diagnostics.watchdog import watching
from hvdlm.errors import HvdlmError
from hvdlm.io import launcher_env
from hvdlm.protocols.backend import StartsRanks
from hvdlm.training.run import Plan, Run, plan
from hvdlm.training.signals import Signals
from hvdlm.training.whole_run import run_training
from hvdlm_api.program_state import collect, preserved
from hvdlm_api.rank_errors import raising_on_all_ranks


@dataclass(frozen=True)
class Result:
    """What a training has reached.

    Attributes:
        run: the run's folder.
        status: done, or stopped: it has saved because of a signal or ``train.max_seconds``, and can be resumed.
        reason: why it ended before ``train.steps``; None: it did not.
        steps: optimizer steps done, those before a resumption included.
        val_loss: loss of the last evaluation in nats per token; None for a task without one.
        best_val_loss: the lowest loss of the evaluations during this call.
        checkpoint: the checkpoint that was written last.
        summary: the content of ``summary.json``.
    """

    run: Path
    status: str
    reason: str | None
    steps: int
    val_loss: float | None
    best_val_loss: float | None
    checkpoint: Path | None
    summary: Mapping[str, Any] = field(repr=False)


class _Outcome:
    """Event plugin that keeps the lowest validation loss and the newest checkpoint."""

    def __init__(self) -> None:
        self.best = math.inf
        self.checkpoint: Path | None = None

    @hookimpl
    def hvdlm_evaluated(self, metrics: Mapping[str, float]) -> None:
        """Keep the lowest validation loss."""
        self.best = min(self.best, metrics.get("val_loss", math.inf))

    @hookimpl
    def hvdlm_checkpoint_saved(self, path: str) -> None:
        """Keep the path of the newest checkpoint."""
        self.checkpoint = Path(path)


def train(config: Config, *, ranks: int | None = None) -> Result:
    """Train a model, and return the result; every rank of a launch calls.

    A signal, such as Ctrl-C, makes the run save and return; a second one raises KeyboardInterrupt. In a thread other
    than the main one, signals are left to the program.

    Args:
        config: what to train
        ranks: train on this many ranks, which are threads of this process (backend threads); None: on those that a
            launcher started

    Raises:
        HvdlmError: bad input, before anything is computed.
        RankError: the training failed. Where it failed on some of several processes only, these end all of them
            instead. Of ranks that are threads, the error is that of the first that failed.
    """
    if ranks is None:
        return _train(config)
    backend = plugins.make(plugins.load(["threads"]), "backend", "threads")
    if not isinstance(backend, StartsRanks):
        raise HvdlmError(f"ranks: another plugin's backend {backend.name} starts none.")
    start = partial(backend.run_ranks, ranks, lambda: _train(config))
    with preserved(start) as results:
        return results[0]


def _train(config: Config) -> Result:
    """Train on this rank."""
    if not isinstance(config, Config):
        raise HvdlmError(f"hvdlm.train takes a hvdlm.Config, got a {type(config).__name__}: use hvdlm.Config.load.")
    signals = Signals(launcher_env.rank_for_messages())
    signals.interrupts = launcher_env.launch_shape()[1] == 1
    outcome = _Outcome()
    with watching(process_ends=False):
        try:
            signals.listen()
            with preserved(lambda: _plan(config)) as checked:
                run, summary = run_training(checked, signals, raising_on_all_ranks, outcome)
                run.world.close()
        finally:
            signals.restore()
    result = _result(run, outcome, summary)
    del run, checked, signals  # the model among what they know
    collect()
    return result


def _plan(config: Config) -> Plan:
    """Check the configuration, which is loaded again: values may have been assigned."""
    config = Config.load(config)
    process.timeout = config.communication.timeout
    return plan(config)


def _result(run: Run, outcome: _Outcome, summary: Mapping[str, Any]) -> Result:
    resumed = run.checkpoint.path if run.checkpoint else None
    return Result(
        run=run.folder,
        status="stopped" if summary["stopped"] else "done",
        reason=summary["stopped"] or summary["ended_early"],
        steps=summary["steps"],
        val_loss=summary.get("val_loss"),
        best_val_loss=outcome.best if math.isfinite(outcome.best) else None,
        checkpoint=outcome.checkpoint or resumed,
        summary=summary,
    )
