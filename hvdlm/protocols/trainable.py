"""A model in training, with its optimizer, on one rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from hvdlm.protocols.inference import Inference
from hvdlm.protocols.state_dict import StateDict
from hvdlm.protocols.types import Batch, StepResult, Traffic


class Training(Protocol):
    """Computes gradients, has them reduced, updates the parameters, and reports on itself."""

    def train_step(
        self, micro_batches: Sequence[Batch], learning_rate: float, step: int, limit: float = float("inf")
    ) -> StepResult:
        """Do one optimizer step on this rank's rows of the global batch. All ranks call, with equally many.

        Gradients that are not finite (those of no target at all, too) or above ``limit`` are not applied (``skipped``).
        """

    def eval_step(self, batch: Batch) -> tuple[float, float]:
        """Return (sum of losses over valid tokens in nats, valid tokens) of this rank's rows.

        No communication along the data axis, but with ZeRO-3, where all ranks call equally often. Only the ranks of the
        last pipeline stage return the losses.
        """

    def fingerprints(self) -> dict[str, int]:
        """Return a CRC-32 of this rank's shard of every parameter, by global name.

        Empty where the ranks of the data axis may hold different parameters now (local SGD), or hold shards of them.
        """

    def memory(self) -> dict[str, int]:
        """Return the bytes that this rank holds for parameters, gradients, optimizer and activations.

        Activations: the peak kept for the backward pass, as measured in the first step. With ZeRO-3, parameters and
        gradients are those of the moment at which most of both together was held.
        """

    def traffic(self) -> dict[str, Traffic]:
        """Return the counters of all groups of this rank, by ``purpose/operation``."""


class Trainable(Training, Inference, StateDict, Protocol):
    """A model with its optimizer."""


@runtime_checkable
class CountsCorrect(Protocol):
    """A Trainable whose evaluation tells the targets that the model predicts. Optional: others tell the loss alone."""

    def eval_figures(self, batch: Batch) -> tuple[float, float, float]:
        """Return (sum of losses, number of valid tokens, number of those of which no other token has a higher score).

        Otherwise as ``eval_step``. A token that shares the highest score with others counts; of CTC, none do.
        """


@runtime_checkable
class HasMovingAverage(Protocol):
    """A Trainable that keeps the moving average of its parameters with ``train.ema``."""

    def show_average(self, shown: bool) -> None:
        """Compute with the moving average until the next step or ``state()``, or with the parameters again.

        All ranks call: ZeRO's gather the average.
        """


@runtime_checkable
class HasDeviceMemory(Protocol):
    """A Trainable that may compute on a GPU."""

    def device_memory_peak(self) -> int | None:
        """Return the most bytes of the GPU's memory that this rank's tensors took at once; None: it has no GPU."""
