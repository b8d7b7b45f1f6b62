"""Steps that would harm, because gradients are not finite or spike: what is applied, and when the run goes back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hvdlm.config import TrainConfig
from hvdlm.errors import RankError
from hvdlm.protocols.types import StepResult
from hvdlm.training.consensus import Votes

_DECAY, _SETTLED = 0.98, 50  # of the mean of norms; steps before spikes are judged
_RETURNS = 3  # to one checkpoint, before the run gives up


class StepGuard:
    """Says which gradient norms are applied, and when skipped steps are too many.

    ``replicas_diverge``: ranks train by themselves between synchronisations, and may skip what others apply.
    """

    def __init__(self, options: TrainConfig, replicas_diverge: bool, state: Mapping[str, Any] | None = None) -> None:
        self._options, self._replicas_diverge = options, replicas_diverge
        self._bad: list[int] = []
        self._returned: dict[int, int] = {}
        self._load(state or {})

    def _load(self, state: Mapping[str, Any]) -> None:
        self._mean, self._steps = float(state.get("mean_norm", 0.0)), int(state.get("steps", 0))

    def state(self) -> dict[str, Any]:
        """Return what a resumed run goes on from."""
        return {"mean_norm": self._mean, "steps": self._steps}

    @property
    def limit(self) -> float:
        """The largest norm that is applied."""
        settled = self._options.spike > 0 and self._steps >= _SETTLED
        return self._options.spike * self._mean if settled else math.inf

    def add(self, result: StepResult) -> None:
        """Take an applied step's norm into the mean."""
        if not result.skipped and math.isfinite(result.grad_norm):
            self._steps += 1
            share = max(1.0 - _DECAY, 1.0 / self._steps)
            self._mean += share * (result.grad_norm - self._mean)

    def heard(self, heard: Votes, ranks: int) -> list[int]:
        """Hear of a step; return the rows of the batches that went wrong where the run has to go back, else nothing.

        That is after too many in a row, or where some ranks skipped what others applied: replicas are apart then.
        """
        if heard.row is None:
            return []
        self._bad = [*self._bad, heard.row] if heard.skipped else []
        torn = 0 < heard.skipped < ranks and not self._replicas_diverge
        return self._bad if torn or len(self._bad) >= self._options.max_skips else []

    def go_back(self, step: int, state: Mapping[str, Any]) -> None:
        """Take over ``state`` from the checkpoint of ``step``, to which the run goes back.

        Raises:
            RankError: it has done so too often: something else is wrong than a few batches.
        """
        self._bad = []
        self._load(state)
        self._returned[step] = self._returned.get(step, 0) + 1
        if self._returned[step] > _RETURNS:
            raise RankError(
                f"after {_RETURNS} returns to the checkpoint of step {step}, gradients are still "
                f"{'not finite or spiking' if self._options.spike else 'not finite'}: {ADVICE}"
            )


ADVICE = "lower --train.learning_rate, set --train.clip, or look at the data."
