"""The measured losses of compressors, by which ``communication.max_loss_gap`` allows them.

Source: the table of docs/compression.md: ``examples/shakespeare_char.yaml`` (a GPT of 0.8 million parameters), 2,000
steps on 2 ranks, validation loss in nats. Every row is of the learning rate and clipping of the dense run, since
``communication.auto`` changes neither. ``tests/test_auto.py`` compares these numbers with the document's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DENSE = 1.753
RESOLUTION = 0.001
"""The table's last digit: below it a gap is not known, so that no lossy method has a gap of 0."""


@dataclass(frozen=True)
class Measured:
    """The validation losses of a compressor.

    Attributes:
        losses: of the frameworks that were measured.
        options: of ``communication.compression``, beside the algorithm.
    """

    losses: tuple[float, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def gap(self) -> float:
        """By how many nats the worse of the losses is above the dense one."""
        return round(max(RESOLUTION, max(self.losses) - DENSE), 6)


TABLE: Mapping[str, Measured] = {
    "fp16": Measured((1.753, 1.753)),
    "bf16": Measured((1.753, 1.753)),
    "int8": Measured((1.753, 1.753)),
    "qsgd": Measured((1.773, 1.773)),
    "random_k": Measured((1.781, 1.781), {"ratio": 0.5}),
    "scaled_sign": Measured((1.810, 1.812)),
    "sign_majority": Measured((1.811, 1.812)),
    "power_sgd": Measured((1.832,)),
    "top_k": Measured((1.888,)),
}
"""By ``communication.compression.algorithm``."""
