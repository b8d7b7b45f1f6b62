"""The figures of a step on their way from the device to the host, which reads them when they are asked for.

Without a twin: TensorFlow's graph of a step returns its figures.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from hvdlm.protocols.types import StepResult

ON_HOST = ("cpu",)
"""Types of devices that have computed a tensor when PyTorch returns it."""

_LATE = ("loss", "tokens", "grad_norm", "skipped")


class Figures:
    """Float64 values ``[n]`` that a GPU copies to the host as soon as it has computed them, while both continue."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values
        self._copied: torch.cuda.Event | None = None
        if values.is_cuda:
            # A plain copy would wait for all that is enqueued by then: for the next step, too.
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event(blocking=True)  # waiting for it sleeps instead of spinning
            self._copied.record()
        self.late = values.device.type not in ON_HOST

    def read(self) -> list[float]:
        """Wait for the values and return them."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()


class _Late:
    """An attribute of ``DeviceResult`` before it is read."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, result: Any, owner: type) -> Any:
        if result is not None:
            result.read()
        return self if result is None else vars(result)[self._name]


class DeviceResult(StepResult):
    """A step's result; on a GPU, it has ``loss``, ``tokens``, ``grad_norm`` and ``skipped`` once one of them is read.

    ``figures``: loss, tokens, gradient norm, and 1 where the update was applied; ``stands_for``: factor of the tokens.
    """

    loss: Any = _Late()
    tokens: Any = _Late()
    grad_norm: Any = _Late()
    skipped: Any = _Late()

    def __init__(self, figures: Figures, stands_for: int, comm_seconds: float, comm_bytes: int) -> None:
        super().__init__(math.nan, math.nan, math.nan, comm_seconds, comm_bytes)
        self._figures = figures
        self._stands_for = stands_for
        for name in _LATE:
            del vars(self)[name]
        if not figures.late:
            self.read()

    @property
    def pending(self) -> bool:
        """Whether the figures have not been read yet."""
        return "loss" not in vars(self)

    def read(self) -> None:
        """Wait for the figures."""
        self.loss, tokens, self.grad_norm, applied = self._figures.read()
        self.tokens = tokens * self._stands_for
        self.skipped = not applied
