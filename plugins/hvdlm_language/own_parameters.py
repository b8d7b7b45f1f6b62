"""The parameters of replicas that never agree, beside the averaged ones that are evaluated and saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from hvdlm.parallel.flat_layout import FlatLayout
from hvdlm.parallel.sharded_state import OWN_PARAMETERS, FlatState
from hvdlm.protocols.exchange import Exchange
from hvdlm.protocols.types import Tensor


@runtime_checkable
class Streams(Protocol):
    """What an exchange has beside ``Exchange``'s methods if its collectives stay in flight over several steps.

    Its ranks never hold the same parameters; ``agreed`` is of the averaged ones.
    """

    def advance(self, parameters: Tensor, call: Callable[..., Any] = ...) -> Sequence[tuple[int, Tensor]]:
        """Finish and start collectives after a step, outside of graphs; all ranks call after every step.

        ``call(function, *arguments)`` returns ``function(*arguments)``, of a function of tensors that exists as long as
        the exchange and changes nothing but its Variables; a framework with graphs makes one graph of it. Default: it
        is called as it is.

        Returns (start, values): what replaces elements of the flat ``parameters`` ``[size]``.
        """

    def averaged(self) -> np.ndarray | None:
        """Return the flat parameters ``[size]`` to evaluate and save, equal on all ranks; None: the rank's own."""


class OwnParameters:
    """This replica's own parameters and the averaged ones.

    Attributes:
        streams: the exchange where it is one whose replicas never agree, else None.
    """

    def __init__(self, exchange: Exchange, layout: FlatLayout) -> None:
        self.streams: Streams | None = exchange if isinstance(exchange, Streams) else None
        self._state = FlatState(layout.zero_slots(0, 1))

    def averaged(self, own: np.ndarray) -> np.ndarray:
        """Return the flat parameters ``[size]`` that are evaluated and saved where this replica has ``own``."""
        averaged = self.streams.averaged() if self.streams else None
        return own if averaged is None else averaged

    def entries(self, own: np.ndarray) -> dict[str, np.ndarray]:
        """Return the entries of ``Trainable.state`` that keep this replica's ``own`` flat parameters."""
        return self._state.arrays(own, OWN_PARAMETERS) if self.streams else {}
