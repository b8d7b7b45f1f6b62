"""Dynamic loss scaling of fp16 (Micikevicius et al. 2018, section 3.2): halved on overflow, doubled periodically."""

from __future__ import annotations

import math

import numpy as np

_START, _MAX = 2.0**16, 2.0**24
_STEPS = 2000  # without overflow until the scale is doubled


class LossScale:
    """The factor of losses before the backward pass; 1 in any precision but fp16."""

    def __init__(self, precision: str) -> None:
        self.active = precision == "fp16"
        self.value = _START if self.active else 1.0
        self._steps = 0  # since the scale changed

    def update(self, norm: float, loss: float) -> bool:
        """Adapt the scale to the gradients' norm; return False where the scale was too large for them.

        Where it can't have been (the loss, to which it isn't applied, is not finite, or the scale is at its minimum),
        the gradients are at fault, as in any other precision.
        """
        if not self.active:
            return True
        if not math.isfinite(norm):
            overflowed = math.isfinite(loss) and self.value > 1.0
            self.value, self._steps = max(1.0, self.value / 2) if overflowed else self.value, 0
            return not overflowed
        self._steps += 1
        if self._steps == _STEPS:
            self.value, self._steps = min(_MAX, self.value * 2), 0
        return True

    def state(self) -> np.ndarray:
        """Return float64 ``[2]``: the scale, and the steps since it changed."""
        return np.array([self.value, self._steps], np.float64)

    def load_state(self, state: np.ndarray) -> None:
        """Restore what ``state`` returned."""
        self.value = float(state[0])
        self._steps = int(state[1])
