"""``hvdlm.load``: a trained model, to evaluate it and to generate text."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hvdlm.configuration.parsing import as_arguments
from hvdlm.diagnostics.phases import process
from hvdlm.diagnostics.watchdog import watching
from hvdlm.errors import HvdlmError
from hvdlm.training import loop
from hvdlm.training.run import Run, build
from hvdlm_api.rank_errors import raising_on_all_ranks
from hvdlm_inference.generation import text_of
from hvdlm_inference.trained_run import connect_trained


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
        sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        with self._in_use("generating"):
            text = text_of(self._run, prompt, tokens, **sampling)
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
