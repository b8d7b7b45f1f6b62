"""The plain exchange: every bucket is summed over the data axis by one asynchronous all-reduce."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from hvdlm.config import CommunicationConfig, Config
from hvdlm.diagnostics.flight_recorder import skip_in_call_sites
from hvdlm.hookspecs import hookimpl
from hvdlm.parallel.flat_layout import FlatLayout
from hvdlm.protocols.exchange import ExchangeTraits
from hvdlm.protocols.group import Converted, Group, Handle
from hvdlm.protocols.types import Tensor, Traffic

skip_in_call_sites(__name__)


class AllReduceExchange:
    """Sums gradients as they are: no compression, nothing left out, no state between steps."""

    agreed = True
    stands_for = 1

    def __init__(self, group: Group, options: CommunicationConfig | None = None) -> None:
        options = options or CommunicationConfig()
        self._group = group
        self.size = len(group.ranks)
        self.traits = ExchangeTraits(self.size)
        self._before = 1.0 / options.predivide
        self._after: float = options.predivide * (self.size if options.reduction == "sum" else 1.0)

    @property
    def traffic(self) -> dict[str, Traffic]:
        """The group's counters."""
        return self._group.traffic

    def open(self, layout: FlatLayout, parameters: np.ndarray) -> None:
        """Do nothing: sums need neither the layout nor the parameters."""

    def begin(self, step: int) -> Hashable:
        """Return the only phase."""
        return None

    def start(self, bucket: Tensor, index: int) -> Handle:
        """Start to sum the flat bucket."""
        return self.scaled(self._group.all_reduce_async(self.predivided(bucket), f"gradients.{index}"))

    def predivided(self, bucket: Tensor) -> Tensor:
        """Return the bucket divided by ``communication.predivide``."""
        return bucket if self._before == 1.0 else bucket * self._before

    def scaled(self, handle: Handle) -> Handle:
        """Return ``handle`` with its result multiplied as ``predivide`` and ``reduction`` ask for."""
        return handle if self._after == 1.0 else Converted(handle, lambda total: total * self._after)

    def start_metrics(self, values: Tensor) -> Handle:
        """Start to sum the metrics."""
        return self._group.all_reduce_async(values, "metrics")

    def gather(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """Return the shards unchanged: every rank updates all parameters."""
        return list(shards)

    def finish(self, parameters: Tensor) -> Tensor | None:
        """Return None: the parameters stay."""
        return None

    def state(self) -> dict[str, np.ndarray]:
        """Return no entries: sums keep no state."""
        return {}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Do nothing: sums keep no state."""


class AdasumExchange(AllReduceExchange):
    """Combines ranks' mean gradients by Adasum (Maleki et al. 2020, eq. 3), bucket by bucket."""

    def start(self, bucket: Tensor, index: int) -> Handle:
        """Start to combine the flat bucket: orthogonal gradients add up, parallel ones average."""
        # A rank's bucket is its contribution to the global mean; times the ranks, it is the mean over its own rows.
        return self._group.all_reduce_async(bucket * float(self.size), f"gradients.{index}", op="adasum")


@hookimpl
def hvdlm_make_exchange(name: str, group: Group, config: Config, index: int) -> AllReduceExchange | None:
    """Return the exchange ``all_reduce``: of sums, of sharded optimizers (ZeRO), or Adasum."""
    if name != "all_reduce":
        return None
    if config.parallel.zero and len(group.ranks) > 1:
        from hvdlm.parallel.zero import ZeroExchange

        return ZeroExchange(group, config.communication, index, config.parallel.zero)
    if config.communication.reduction == "adasum" and len(group.ranks) > 1:
        return AdasumExchange(group, config.communication)
    return AllReduceExchange(group, config.communication)
