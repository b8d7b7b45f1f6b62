"""The Python API, ``hvdlm.train`` and ``hvdlm.load``: what the commands do, with exceptions in place of exit codes.

Under a launcher every rank calls, and gets the same result. Watchdog and signal handlers are there during a call only;
the transport stays open between calls, since most can be started once in a process.
"""

from __future__ import annotations

import atexit
import math
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.configuration.parsing import as_arguments
from hvdlm.diagnostics.phases import process
from hvdlm.diagnostics.rank_errors import raising_on_all_ranks
from hvdlm.diagnostics.watchdog import watching
from hvdlm.errors import HvdlmError
from hvdlm.inference.generation import chunks_of_text
from hvdlm.inference.sampling import Sampling
from hvdlm.io import launcher_env
from hvdlm.protocols.world import World
from hvdlm.telemetry import default_plugins
from hvdlm.training import loop
from hvdlm.training.run import Run, build, connect, plan
from hvdlm.training.signals import Signals
from hvdlm.training.trained_run import connect_trained


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
    summary: Mapping[str, Any]


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


def run_training(
    config: Config, signals: Signals, guard: Callable[[World], AbstractContextManager[Any]]
) -> tuple[Result, World]:
    """Train, and return the result and the ranks; ``guard`` ends the ranks where one fails. All ranks call.

    Raises:
        HvdlmError: bad input.
        RankError: the result is not finite, or ranks can't communicate.
    """
    process.timeout = config.communication.timeout
    connected = connect(plan(config))
    outcome = _Outcome()
    try:
        with connected.lock or nullcontext(), guard(connected.world):
            run = build(connected)
            for plugin in (*default_plugins(run.config), outcome):
                run.manager.register(plugin)
            summary = loop.train(run, signals)
            signals.ignore()
    finally:
        if connected.lock:
            atexit.unregister(connected.lock.release)
    return _result(run, outcome, summary), connected.world


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


def train(config: Config) -> Result:
    """Train a model, and return the result; every rank of a launch calls.

    A signal, such as Ctrl-C, makes the run save and return; a second one raises KeyboardInterrupt. In a thread other
    than the main one, signals are left to the program.

    Raises:
        HvdlmError: bad input, before anything is computed.
        RankError: the training failed. Where it failed on some of several ranks only, these end all of them instead.
    """
    if not isinstance(config, Config):
        raise HvdlmError(f"hvdlm.train takes a hvdlm.Config, got a {type(config).__name__}: use hvdlm.Config.load.")
    signals = Signals(launcher_env.rank_for_messages())
    signals.interrupts = launcher_env.launch_shape()[1] == 1
    with watching(process_ends=False):
        try:
            # Loaded again, so that values which were assigned are checked as those on the command line are.
            result, world = run_training(Config.load(config), signals.listen(), raising_on_all_ranks)
        finally:
            signals.restore()
        world.close()
    return result


class TrainedRun:
    """The model of a run, loaded; every rank of a launch calls its methods.

    Attributes:
        config: the run's configuration, with the overrides given to ``load``.
        step: the step of the checkpoint.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self.config = run.requested
        self.step = run.start_step
        self._closer = weakref.finalize(self, run.world.close)

    def evaluate(self) -> dict[str, float]:
        """Return the task's metrics on the whole validation split, such as ``val_loss`` and ``perplexity``."""
        with self._in_use("evaluating"):
            return loop.evaluate(self._run)

    def generate(
        self,
        prompt: str,
        tokens: int = 200,
        *,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 1,
    ) -> str:
        """Return ``prompt`` and its continuation, or the response of another task, such as a translation.

        Args:
            prompt: text that is continued
            tokens: number of tokens to generate
            temperature: sampling temperature; 0: greedy
            top_k: sample from the k most probable tokens; 0: all
            top_p: sample from the most probable tokens whose probabilities sum to this
            seed: random seed

        Raises:
            HvdlmError: a value is out of its range, or the vocabulary lacks a character of the prompt.
        """
        if tokens < 1:
            raise HvdlmError(f"tokens is {tokens}, expected 1 or more.")
        sampling = Sampling(temperature, top_k, top_p, seed)
        with self._in_use("generating"):
            text = "".join(chunks_of_text(self._run, prompt, tokens, sampling))
            return str(self._run.world.broadcast_object(text))

    def close(self) -> None:
        """Release the ranks' connections; other methods can't be called any more. Also at the end of a ``with``."""
        self._closer()

    def __enter__(self) -> TrainedRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _in_use(self, phase: str) -> Iterator[None]:
        world = self._run.world
        if not self._closer.alive:
            raise HvdlmError("this run is closed: load it again (hvdlm.load).")
        with watching(process_ends=False):
            process.timeout, process.size = self._run.config.communication.timeout, world.size
            process.connect(world.recorder, world.abort)
            process.begin(phase)
            with raising_on_all_ranks(world):
                yield


def load(
    run: str | os.PathLike[str],
    options: Mapping[str, Any] | None = None,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
) -> TrainedRun:
    """Return the model of a trained run; every rank of a launch calls.

    Args:
        run: the run's folder
        options: override the run's own, for example ``{"framework": "tensorflow", "data.path": "other.txt"}``
        checkpoint: checkpoint folder; None: the newest of the run

    Raises:
        HvdlmError: there is no such run or checkpoint, or it is damaged.
    """
    with watching(process_ends=False):
        chosen = None if checkpoint is None else os.fspath(checkpoint)
        connected = connect_trained(os.fspath(run), chosen, as_arguments(options or {}))
        with raising_on_all_ranks(connected.world):
            return TrainedRun(build(connected))
