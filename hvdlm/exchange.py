"""The plain exchange: every bucket is summed over the data axis by one asynchronous all-reduce."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.interfaces import Group, Handle, Tensor


class AllReduceExchange:
    """Sums gradients as they are: no compression, nothing left out, nothing remembered."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self.size = len(group.ranks)

    @property
    def bytes(self) -> int:
        """Bytes handed to collectives so far."""
        return sum(traffic.bytes for traffic in self._group.traffic.values())

    def start(self, bucket: Tensor, index: int) -> Handle:
        """Begin to sum the flat bucket; see ``interfaces.Exchange``."""
        return self._group.all_reduce_async(bucket, f"gradients.{index}")

    def start_metrics(self, values: Tensor) -> Handle:
        """Begin to sum the metrics; see ``interfaces.Exchange``."""
        return self._group.all_reduce_async(values, "metrics")

    def state(self) -> dict[str, np.ndarray]:
        """Return nothing: sums remember nothing."""
        return {}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over nothing."""


@hookimpl
def hvdlm_make_exchange(name: str, group: Group, config: Config) -> AllReduceExchange | None:
    """Answer to ``all_reduce``."""
    return AllReduceExchange(group) if name == "all_reduce" else None
