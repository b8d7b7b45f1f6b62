"""``hvdlm.load``: a trained model, to evaluate it and to generate text."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, get_args, overload

from hvdlm.diagnostics.phases import process
from hvdlm.diagnostics.watchdog import watching
from hvdlm.errors import HvdlmError
from hvdlm.training import loop
from hvdlm.training.run import Plan, Run, build, connect
from hvdlm_api.configurations import as_arguments, path_of
from hvdlm_api.program_state import collect, preserved
from hvdlm_api.rank_errors import raising_on_all_ranks
from hvdlm_inference.generation import BATCH_SIZE, check_request, texts_of
from hvdlm_inference.sampling import Sampling
from hvdlm_inference.trained_run import Weights, plan_trained, run_file


class TrainedRun:
    """The model of a run, loaded; every rank of a launch calls its methods.

    Attributes:
        config: the run's configuration, with the overrides given to ``load``.
        step: the step of the checkpoint.
    """

    def __init__(self, run: Run) -> None:
        self._run: Run | None = run
        self.config = run.requested
        self.step = run.start_step
        self._closer = weakref.finalize(self, run.world.close)

    def evaluate(self) -> dict[str, float]:
        """Return the task's metrics on the whole validation split, such as ``val_loss`` and ``perplexity``."""
        with self._in_use("evaluating") as run:
            return loop.evaluate(run)

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is a sequence of str, too
        self,
        prompt: str,
        tokens: int = 200,
        *,
        num_samples: None = None,
        batch_size: int = BATCH_SIZE,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 1,
    ) -> str: ...

    @overload
    def generate(
        self,
        prompt: str | Sequence[str],
        tokens: int = 200,
        *,
        num_samples: int | None = None,
        batch_size: int = BATCH_SIZE,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 1,
    ) -> list[str]: ...

    def generate(
        self,
        prompt: str | Sequence[str],
        tokens: int = 200,
        *,
        num_samples: int | None = None,
        batch_size: int = BATCH_SIZE,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 1,
    ) -> str | list[str]:
        """Return ``prompt`` and its continuation, or the response of another task, such as a translation.

        Of several prompts, or with ``num_samples``, return a list of texts: all samples of the first prompt, then those
        of the next. Each text is the same as if it were generated alone, with its prompt and seed.

        Args:
            prompt: text that is continued, or a sequence of such texts
            tokens: number of tokens to generate
            num_samples: number of samples of every prompt, with seeds ``seed``, ``seed + 1``, ...
            batch_size: number of texts that are computed together
            temperature: sampling temperature; 0: greedy
            top_k: sample from the k most probable tokens; 0: all
            top_p: sample from the most probable tokens whose probabilities sum to this
            seed: random seed

        Raises:
            HvdlmError: a value is out of its range, or the vocabulary lacks a character of a prompt.
        """
        with self._in_use("generating") as run:
            single = isinstance(prompt, str | bytes) or not isinstance(prompt, Sequence)
            prompts: Any = [prompt] if single else list(prompt)
            samples: Any = 1 if num_samples is None else num_samples
            check_request(prompts, tokens, samples, batch_size)
            sampling = asdict(Sampling(temperature, top_k, top_p, seed))
            request = [prompts, int(tokens), int(samples), int(batch_size)]
            request, sampling = run.world.broadcast_object([request, sampling])
            texts: list[str] = []
            refusal = ""
            try:
                texts = texts_of(run, *request, **sampling)
            except HvdlmError as error:  # on the ranks that generate, which are some of all
                refusal = str(error)
            texts, refusal = run.world.broadcast_object([texts, refusal])
            if refusal:
                raise HvdlmError(refusal)
            return texts[0] if single and num_samples is None else texts

    def close(self) -> None:
        """Release the model and the ranks' connections; only ``config`` and ``step`` remain. ``with`` calls it, too."""
        if self._closer.alive:
            self._closer()
            self._run = None
            collect()

    def __enter__(self) -> TrainedRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _in_use(self, phase: str) -> Iterator[Run]:
        run = self._run
        if run is None:
            raise HvdlmError("this run is closed: load it again (hvdlm.load).")
        with watching(process_ends=False):
            process.timeout, process.size = run.config.communication.timeout, run.world.size
            process.connect(run.world.recorder, run.world.abort)
            process.begin(phase)
            with raising_on_all_ranks(run.world, closes=False):
                calls = run.world.gather_objects(phase)
                other = next((rank for rank, call in enumerate(calls) if call != calls[0]), None)
                if other is not None:
                    raise HvdlmError(
                        f"all ranks make the same calls, but rank 0 is {calls[0]} and rank {other} is {calls[other]}: "
                        "call evaluate and generate on every rank, in the same order."
                    )
                yield run


def load(
    run: str | os.PathLike[str],
    options: Mapping[str, Any] | None = None,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    weights: Weights = "trained",
) -> TrainedRun:
    """Return the model of a trained run; every rank of a launch calls.

    Args:
        run: the run's folder
        options: override the run's own, for example ``{"framework": "tensorflow", "data.path": "other.txt"}``
        checkpoint: checkpoint folder; None: the newest of the run
        weights: trained, or ema: their moving average, of runs with train.ema

    Raises:
        HvdlmError: there is no such run, checkpoint or average, or it is damaged.
    """
    folder = path_of(run, "hvdlm.load takes the folder of a run, such as Result.run")
    chosen = None if checkpoint is None else path_of(checkpoint, "checkpoint: expected a checkpoint's folder")
    if not isinstance(options or {}, Mapping):
        raise HvdlmError(f"options: expected a mapping such as {{'data.path': 'other.txt'}}, got {options!r:.80}.")
    if weights not in get_args(Weights):
        raise HvdlmError(f"weights: expected trained or ema, got {weights!r:.80}.")
    with watching(process_ends=False), preserved(lambda: _plan(folder, chosen, options or {}, weights)) as plan:
        connected = connect(plan)
        with raising_on_all_ranks(connected.world):
            return TrainedRun(build(connected))


def _plan(run: str, checkpoint: str | None, options: Mapping[str, Any], weights: Weights) -> Plan:
    return plan_trained(run, checkpoint, as_arguments([options], [run_file(run)]), weights)
