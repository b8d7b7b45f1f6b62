"""What training adds to the cross entropy of a target."""

from __future__ import annotations

from typing import NamedTuple

from hvdlm.config import TrainConfig


class LossTerms(NamedTuple):
    """Terms of a target's loss, -log p + ... of scores z: with log Z = log sum exp(z), log p = z[target] - log Z.

    Attributes:
        smoothing: share s of the target that is spread over the vocabulary (Szegedy et al. 2016, section 7):
            (1 - s) (-log p) + s mean(log Z - z).
        z_loss: factor of (log Z)^2 (Chowdhery et al. 2022, section 5), which keeps scores near log-probabilities.
    """

    smoothing: float = 0.0
    z_loss: float = 0.0

    @classmethod
    def of(cls, train: TrainConfig) -> LossTerms:
        """Return those of a run's training; evaluation has none."""
        return cls(train.label_smoothing, train.z_loss)
