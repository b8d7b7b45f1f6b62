"""Values that core and plugins exchange: batches, results of steps, predictions, traffic counters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

Tensor = Any
"""A tensor of the active framework (torch.Tensor or tf.Tensor), opaque to the core."""


@dataclass
class Batch:
    """One rank's rows of one batch.

    Attributes:
        inputs: int32 ``[rows, time]``, token ids.
        targets: int32 ``[rows, time]``, the next token at each position.
        weights: float32 ``[rows, time]``, 1 where the target counts, 0 where it is padding; None: all count.
        reset: whether a recurrent model starts this batch from its zero state.
        features: model inputs other than tokens, by the names in ``ModelSpec.reads``, each ``[rows, ...]``.
        items: int64 ``[rows]``, the indices of a task's items, for the task's own metrics; models don't see them.
        corpus: the corpus that a validation batch of a mixture comes from; its sums are then ``CORPUS/loss``, ...
        document_starts: int32 ``[rows, time]``, the index in its row of the first token of every input's document: an
            input attends to no earlier one, and its position counts from there. None: rows are not divided.
    """

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray | None = None
    reset: bool = False
    features: Mapping[str, np.ndarray] = field(default_factory=dict)
    items: np.ndarray | None = None
    corpus: str = ""
    document_starts: np.ndarray | None = None

    def rows(self, start: int, stop: int) -> Batch:
        """Return rows ``start:stop`` as a separate batch."""
        weights = None if self.weights is None else self.weights[start:stop]
        features = {name: array[start:stop] for name, array in self.features.items()}
        items = None if self.items is None else self.items[start:stop]
        starts = None if self.document_starts is None else self.document_starts[start:stop]
        arrays = self.inputs[start:stop], self.targets[start:stop], weights
        return Batch(*arrays, self.reset, features, items, self.corpus, starts)

    @property
    def tokens(self) -> float:
        """Number of targets that count."""
        return float(self.targets.size if self.weights is None else self.weights.sum(dtype="float64"))


@dataclass
class StepResult:
    """The result of one optimizer step. Seconds and bytes are this rank's; everything else is the same on all ranks.

    A framework may return a subclass of which ``loss``, ``tokens``, ``grad_norm`` and ``skipped`` are ``pending``:
    the first that is read waits until a device has computed the step. All ranks return the same kind.

    Attributes:
        loss: mean loss over all valid tokens of the global batch, in nats, before the update.
        tokens: valid tokens in the global batch.
        grad_norm: global L2 norm of the averaged gradient before clipping.
        comm_seconds: time for which the step was blocked on communication (what the backward pass did not hide).
        comm_bytes: bytes this rank handed to collectives.
        transfer_seconds: time that collectives took in the background, hidden or not; None: unknown. Set by the loop.
        data_seconds: time this rank waited for its batch. Set by the loop.
        idle_seconds: time this rank waited for other pipeline stages' results (included in comm_seconds).
        axis_bytes: comm_bytes by mesh axis (``communication.traffic.AXIS_OF``).
        skipped: the update was not applied, because gradients were not finite or their norm was above the limit,
            or the batch is ``empty``.
        device_memory_peak: ``HasDeviceMemory`` of this rank, in steps that are logged. Set by the loop.
    """

    loss: float
    tokens: float
    grad_norm: float
    comm_seconds: float = 0.0
    comm_bytes: int = 0
    transfer_seconds: float | None = None
    data_seconds: float = 0.0
    idle_seconds: float = 0.0
    axis_bytes: dict[str, int] = field(default_factory=dict)
    skipped: bool = False
    device_memory_peak: int | None = None

    @property
    def pending(self) -> bool:
        """Whether a figure that is read now waits for a device."""
        return False

    @property
    def bad(self) -> bool:
        """Whether the update was skipped for a fault: gradients that were not finite, or a norm above the limit."""
        return self.skipped and not self.empty

    @property
    def failed(self) -> bool:
        """Whether the update was skipped because gradients were not finite."""
        return self.bad and not math.isfinite(self.grad_norm)

    @property
    def empty(self) -> bool:
        """Whether the global batch has no targets: the update was skipped, which is no fault; the loss is NaN."""
        return self.tokens == 0

    @property
    def applied(self) -> bool:
        """Whether the update was applied; in fp16 it isn't where the loss scale was too large, which is no fault."""
        return not self.skipped and math.isfinite(self.grad_norm)


@dataclass(frozen=True)
class Prediction:
    """The closed-form costs of one rank's step.

    Attributes:
        memory: bytes of parameters, gradients, optimizer and activations.
        bytes: bytes handed to collectives in a step, by mesh axis; None: gradients are not exchanged whole.
        idle_share: fraction of a step in which a pipeline stage waits.
        layers: (first, last exclusive) of the layers that the rank computes; with virtual stages, of each in turn.
        micro_batches: micro-batches of a step.
    """

    memory: dict[str, int]
    bytes: dict[str, int] | None
    idle_share: float
    layers: tuple[int, ...]
    micro_batches: int


@dataclass
class Traffic:
    """Counters of one kind of collective for one purpose: calls, bytes handed to the library, seconds blocked."""

    calls: int = 0
    bytes: int = 0
    seconds: float = 0.0
