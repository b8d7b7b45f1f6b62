"""fp16's loss scale (Micikevicius et al. 2018, section 3.2): halved where gradients overflow, doubled after a while."""

from __future__ import annotations

import math

import numpy as np

_STEPS, _MOST = 2000, 2.0**24


class LossScale:
    """What losses are multiplied by before the backward pass; 1 in any precision but fp16."""

    def __init__(self, precision: str) -> None:
        self.active = precision == "fp16"
        self.value, self._steps = (2.0**16 if self.active else 1.0), 0

    def update(self, norm: float) -> bool:
        """Adapt to the gradients' norm; return whether they are usable."""
        if not self.active:
            return True
        if not math.isfinite(norm):
            self.value, self._steps = max(1.0, self.value / 2), 0
            return False
        self._steps += 1
        if self._steps == _STEPS:
            self.value, self._steps = min(_MOST, self.value * 2), 0
        return True

    def state(self) -> np.ndarray:
        """Return float64 ``[2]``: the scale, and the steps since it changed."""
        return np.array([self.value, self._steps], np.float64)

    def load_state(self, state: np.ndarray) -> None:
        """Take over what ``state`` returned."""
        self.value, self._steps = float(state[0]), int(state[1])
