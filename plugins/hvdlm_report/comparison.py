"""Compares the losses of two runs."""

from __future__ import annotations

from dataclasses import dataclass

from hvdlm_report.runs import RunData


@dataclass(frozen=True)
class Comparison:
    """The losses of two runs, compared at the steps that both have logged.

    Attributes:
        steps: how many these are.
        largest: the largest difference at any of them.
        tolerance: difference above which the runs have diverged.
        diverged_at: the first step at which they have, None if there is none.
        values: the two losses at that step.
    """

    steps: int
    largest: float
    tolerance: float
    diverged_at: int | None
    values: tuple[float, float] | None

    def sentence(self) -> str:
        """Return the result as one or two sentences."""
        if not self.steps:
            return "The runs have logged no step in common."
        if self.diverged_at is None or self.values is None:
            return (
                f"Losses agree within {self.tolerance:g} on all {self.steps} logged steps that both have; the largest "
                f"difference is {self.largest:.3g}."
            )
        first, second = self.values
        return (
            f"Losses are first more than {self.tolerance:g} apart at step {self.diverged_at}: {first:.6g} and "
            f"{second:.6g}. The largest difference over {self.steps} steps is {self.largest:.3g}."
        )


def compare(first: RunData, second: RunData, tolerance: float) -> Comparison:
    """Compare the losses of two runs at the steps that both have logged."""
    steps = sorted(first.losses.keys() & second.losses.keys())
    differences = [abs(first.losses[step] - second.losses[step]) for step in steps]
    at = next((step for step, size in zip(steps, differences, strict=True) if size > tolerance), None)
    values = None if at is None else (first.losses[at], second.losses[at])
    return Comparison(len(steps), max(differences, default=0.0), tolerance, at, values)
