"""Skips steps whose gradients are not finite or spike, and decides when the run rolls back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hvdlm.config import TrainConfig
from hvdlm.errors import RankError
from hvdlm.protocols.types import StepResult
from hvdlm.training.consensus import Votes

_DECAY = 0.98  # of the running mean of norms
_SETTLED = 50  # steps until the mean is reliable enough to detect spikes
_MAX_ROLLBACKS = 3  # to one checkpoint


class StepGuard:
    """Limits the gradient norms that are applied, and counts skipped steps.

    ``replicas_diverge``: ranks train independently between synchronisations, and may skip steps that others apply.
    """

    def __init__(self, options: TrainConfig, replicas_diverge: bool, state: Mapping[str, Any] | None = None) -> None:
        self._options = options
        self._replicas_diverge = replicas_diverge
        self._bad: list[int] = []
        self._rollbacks: dict[int, int] = {}
        self._tried: set[int] = set()
        self._furthest = 0
        self._load(state or {})

    def _load(self, state: Mapping[str, Any]) -> None:
        self._mean = float(state.get("mean_norm", 0.0))
        self._steps = int(state.get("steps", 0))

    def state(self) -> dict[str, Any]:
        """Return the state from which a resumed run continues, for the manifest."""
        return {"mean_norm": self._mean, "steps": self._steps}

    @property
    def limit(self) -> float:
        """The largest norm that is applied."""
        settled = self._options.spike > 0 and self._steps >= _SETTLED
        return self._options.spike * self._mean if settled else math.inf

    def add(self, result: StepResult) -> None:
        """Add an applied step's norm to the running mean."""
        if not result.skipped and math.isfinite(result.grad_norm):
            self._steps += 1
            weight = max(1.0 - _DECAY, 1.0 / self._steps)
            self._mean += weight * (result.grad_norm - self._mean)

    def bad_rows(self, votes: Votes, ranks: int, last_row: int | None = None) -> list[int]:
        """Count the votes on a step; return the first rows of the bad batches if the run must roll back.

        That is the case after too many skipped steps in a row, where some ranks skipped a step that others applied
        (their replicas then differ), or where the last step of the run, on the batch at ``last_row``, went wrong.
        """
        diverged = 0 < votes.skipped < ranks and not self._replicas_diverge
        if votes.row is not None:
            self._bad = [*self._bad, votes.row] if votes.skipped else []
        if last_row is not None:
            return [*self._bad, last_row]
        return self._bad if diverged or len(self._bad) >= self._options.max_skips else []

    def excluded(self, step: int) -> list[set[int]]:
        """Return the steps of checkpoints to which a rollback from ``step`` must not return, and if no other is left.

        After a rollback that did not help, the next one returns to an older checkpoint. One that was tried is tried
        again where there is no older one or the run has come further, but no more than three times.
        """
        if step > self._furthest:
            self._furthest, self._tried = step, set()
        exhausted = {tried for tried, count in self._rollbacks.items() if count >= _MAX_ROLLBACKS}
        return [self._tried | exhausted, exhausted]

    def rolled_back(self, step: int, state: Mapping[str, Any]) -> None:
        """Load ``state`` from the checkpoint of ``step``, to which the run rolls back."""
        self._bad = []
        self._load(state)
        self._tried = {step} if step in self._tried else {*self._tried, step}
        self._rollbacks[step] = self._rollbacks.get(step, 0) + 1

    def hopeless(self, reason: str) -> RankError:
        """Return the error that ends a run which has to roll back for ``reason``, and has no checkpoint left."""
        tried = ", ".join(map(str, sorted(self._rollbacks)))
        before = f"rollbacks to the checkpoint(s) of step {tried} did not help" if tried else ""
        before = before or "there is no checkpoint to go back to"
        return RankError(f"{reason}, and {before}: {ADVICE}")


ADVICE = "lower --train.learning_rate, set --train.clip, or check the data."
