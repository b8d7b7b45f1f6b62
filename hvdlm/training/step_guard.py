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
_MAX_ROLLBACKS = 3  # to one checkpoint, before the run gives up


class StepGuard:
    """Limits the gradient norms that are applied, and counts skipped steps.

    ``replicas_diverge``: ranks train independently between synchronisations, and may skip steps that others apply.
    """

    def __init__(self, options: TrainConfig, replicas_diverge: bool, state: Mapping[str, Any] | None = None) -> None:
        self._options = options
        self._replicas_diverge = replicas_diverge
        self._bad: list[int] = []
        self._rollbacks: dict[int, int] = {}
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

    def bad_rows(self, votes: Votes, ranks: int) -> list[int]:
        """Count the votes on a step; return the first rows of the bad batches if the run must roll back.

        That is the case after too many skipped steps in a row, or where some ranks skipped a step that others applied:
        their replicas then differ.
        """
        if votes.row is None:
            return []
        self._bad = [*self._bad, votes.row] if votes.skipped else []
        diverged = 0 < votes.skipped < ranks and not self._replicas_diverge
        return self._bad if diverged or len(self._bad) >= self._options.max_skips else []

    def rolled_back(self, step: int, state: Mapping[str, Any]) -> None:
        """Load ``state`` from the checkpoint of ``step``, to which the run rolls back.

        Raises:
            RankError: the run rolled back to it too often: the cause is more than a few bad batches.
        """
        self._bad = []
        self._load(state)
        self._rollbacks[step] = self._rollbacks.get(step, 0) + 1
        if self._rollbacks[step] > _MAX_ROLLBACKS:
            raise RankError(
                f"after {_MAX_ROLLBACKS} rollbacks to the checkpoint of step {step}, gradients are still "
                f"{'not finite or spiking' if self._options.spike else 'not finite'}: {ADVICE}"
            )


ADVICE = "lower --train.learning_rate, set --train.clip, or check the data."
