"""Exchange of updates: ranks agree on what the optimizer's rule makes of their gradients, not on the gradients.

The rule keeps the momentum, compresses it, and returns a direction; ``train.optimizer sgd`` without momentum applies it
with the learning rate and the weight decay, which equals the decoupled one (Loshchilov and Hutter 2019), since what SGD
adds to a gradient is not divided by anything.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
from keras import Variable, ops

from hvdlm.config import CommunicationConfig
from hvdlm.parallel.flat_layout import FlatLayout
from hvdlm.protocols.compressor import Compressor, Request
from hvdlm.protocols.group import Group, Handle
from hvdlm.protocols.types import Tensor
from hvdlm_compression.exchange import CompressedExchange, Unit

Direction = Generator[Request, list[Tensor], Tensor]
"""Yields requests as ``Compressor.reduce`` does, and returns the direction, of the gradient's shape."""


class Rule(Protocol):
    """What an exchange of updates sends, and the direction that it makes of it; written on ``keras.ops``.

    Attributes:
        matrices, replicated: see ``Compressor``; ``dense`` is called for what isn't compressed.
        ranks: that exchange.
    """

    matrices: bool
    biased: bool
    feeds_back: bool
    replicated: tuple[str, ...]
    ranks: int

    def begin(self, step: int) -> Hashable:
        """Prepare for ``step``; return its phase, see ``Exchange.begin``."""

    def payload_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes that a tensor of ``shape`` hands to collectives in a step."""

    def memory(self, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Return the initial values of what is kept for a tensor of ``shape``."""

    def reduce(self, gradient: Tensor, memory: Mapping[str, Any], step: Tensor) -> Direction:
        """Exchange this rank's estimate of the mean ``gradient``; ``memory`` holds keras Variables."""

    def dense(self, gradient: Tensor, memory: Mapping[str, Any], step: Tensor) -> Direction:
        """Exchange a ``gradient`` that is too small to be compressed, ``[n]``."""


@dataclass
class DenseUnit(Unit):
    """All slots of a bucket that are not compressed, as a vector."""


class UpdateExchange(CompressedExchange):
    """Returns a rule's directions in place of summed gradients."""

    def __init__(self, group: Group, rule: Rule, options: CommunicationConfig) -> None:
        # Its ``reduce`` is called by this class alone.
        super().__init__(group, cast(Compressor, rule), options)
        self._rule = rule

    def open(self, layout: FlatLayout, parameters: np.ndarray) -> None:
        """Decide which slots are compressed, and reset all that is kept."""
        first = not self._buckets
        super().open(layout, parameters)
        for bucket in self._buckets if first else []:
            if bucket.dense:
                shape = (sum(slot.stop - slot.start for slot in bucket.dense),)
                kept = {name: Variable(array, trainable=False) for name, array in self._rule.memory(shape).items()}
                bucket.units.append(DenseUnit(bucket.dense, shape, None, kept))
                bucket.dense = ()

    def begin(self, step: int) -> Hashable:
        """Begin a step; return the rule's phase."""
        self._in_flight = []
        self._step.assign(np.int32(step))
        self._copy_state()
        return self._rule.begin(step)

    def start(self, bucket: Tensor, index: int) -> Handle:
        """Start to exchange the flat bucket; the handle's result is its direction, ``[elements]``."""
        # A rank's bucket is its contribution to the mean over all ranks; times the ranks, the mean over its own rows.
        return super().start(bucket * float(self.size), index)

    def _job(self, unit: Unit, vector: Tensor, step: Tensor) -> Any:
        gradient = ops.reshape(vector, unit.shape)
        exchange: Callable[..., Direction] = self._rule.dense if isinstance(unit, DenseUnit) else self._rule.reduce
        direction = yield from exchange(gradient, unit.memory, step)
        return ops.reshape(direction, (-1,))

    def units(self) -> list[Unit]:
        """Return the units of all buckets, in order."""
        return [unit for bucket in self._buckets for unit in bucket.units]
