"""The exponential moving average of a flat vector: see ``hvdlm.parallel.moving_average``."""

from __future__ import annotations

import torch

from hvdlm.parallel.moving_average import decay_at


class MovingAverage:
    """The average of the flat float32 ``parameter`` ``[size]``, which begins as a copy of it.

    Attributes:
        vector: the average, float32 ``[size]``.
    """

    def __init__(self, decay: float, parameter: torch.Tensor) -> None:
        self._decay = decay
        self._parameter = parameter
        self.vector = parameter.clone()

    @torch.no_grad()
    def update(self, step: int, applied: torch.Tensor) -> None:
        """Include the parameters after update number ``step`` (from 0), unless that was not ``applied``.

        ``applied`` is a bool scalar on the device, for which the host doesn't wait.
        """
        weight = (applied * (1.0 - decay_at(self._decay, step))).float()
        self.vector.lerp_(self._parameter, weight)
