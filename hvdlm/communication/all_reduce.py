"""The plain exchange: every bucket is summed over the data axis by one asynchronous all-reduce.

Also what every exchange shares: its group's counters, and how those of a TensorFlow graph's run are told.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from copy import copy

import numpy as np

from hvdlm import hookimpl
from hvdlm.config import CommunicationConfig, Config
from hvdlm.parallel.flat_layout import FlatLayout
from hvdlm.protocols.group import Group, Handle
from hvdlm.protocols.types import Tensor, Traffic


class AllReduceExchange:
    """Sums gradients as they are: no compression, nothing left out, nothing remembered."""

    replicas_diverge = False
    agreed = True
    stands_for = 1
    part, parts, scatters_every = 0, 1, False

    def __init__(self, group: Group, options: CommunicationConfig | None = None) -> None:
        options = options or CommunicationConfig()
        self._group = group
        self.size = len(group.ranks)
        self._before = 1.0 / options.predivide
        self._after: float = options.predivide * (self.size if options.reduction == "sum" else 1.0)

    @property
    def traffic(self) -> dict[str, Traffic]:
        """What the group's collectives moved so far."""
        return self._group.traffic

    def open(self, layout: FlatLayout, parameters: np.ndarray) -> None:
        """Need nothing."""

    def begin(self, step: int) -> Hashable:
        """Return the one phase there is."""
        return None

    def start(self, bucket: Tensor, index: int) -> Handle:
        """Begin to sum the flat bucket; see ``interfaces.Exchange``."""
        if self._before != 1.0:
            bucket = bucket * self._before
        return self.scaled(self._group.all_reduce_async(bucket, f"gradients.{index}"))

    def scaled(self, handle: Handle) -> Handle:
        """Return ``handle``, its answer multiplied by what the settings ask for."""
        return handle if self._after == 1.0 else _Scaled(handle, self._after)

    def start_metrics(self, values: Tensor) -> Handle:
        """Begin to sum the metrics; see ``interfaces.Exchange``."""
        return self._group.all_reduce_async(values, "metrics")

    def gather(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Return the parts: every rank updates all."""
        return list(parts)

    def finish(self, parameters: Tensor) -> Tensor | None:
        """Leave the parameters as they are."""
        return None

    def state(self) -> dict[str, np.ndarray]:
        """Return nothing: sums remember nothing."""
        return {}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over nothing."""


class _Scaled:
    """A sum under way, to be multiplied when it is there."""

    def __init__(self, handle: Handle, factor: float) -> None:
        self._handle, self._factor = handle, factor

    def wait(self) -> Tensor:
        """Return the product."""
        return self._handle.wait() * self._factor


class AdasumExchange(AllReduceExchange):
    """Combines ranks' mean gradients by Adasum (Maleki et al. 2020, eq. 3), bucket by bucket."""

    def start(self, bucket: Tensor, index: int) -> Handle:
        """Begin to combine the flat bucket: orthogonal gradients add up, parallel ones average."""
        # A rank's bucket is its share of the mean: times the ranks it is the mean over its own rows.
        return self._group.all_reduce_async(bucket * float(self.size), f"gradients.{index}", op="adasum")


AXIS_OF = {
    "gradients": "data",
    "parameters": "data",
    "metrics": "data",
    "tensor": "tensor",
    "pipeline": "pipeline",
    "tied": "pipeline",
    "norm": "model",
}
"""The axis of a collective's purpose (the first word of its name); ``model``: all ranks that hold a copy together."""


def by_axis(traffic: Mapping[str, Traffic]) -> dict[str, int]:
    """Return the bytes handed to collectives along every axis of the mesh."""
    found: dict[str, int] = {}
    for key, entry in traffic.items():
        axis = AXIS_OF.get(key.partition("/")[0])
        if axis:
            found[axis] = found.get(axis, 0) + entry.bytes
    return found


def grown(now: Mapping[str, int], earlier: Mapping[str, int]) -> dict[str, int]:
    """Return what ``by_axis`` counts more now than earlier, of the axes where it does."""
    return {axis: count - earlier.get(axis, 0) for axis, count in now.items() if count > earlier.get(axis, 0)}


def snapshot(traffic: Mapping[str, Traffic]) -> dict[str, Traffic]:
    """Return the counters as they stand."""
    return {key: copy(entry) for key, entry in traffic.items()}


def since(traffic: Mapping[str, Traffic], earlier: Mapping[str, Traffic]) -> dict[str, Traffic]:
    """Return what has been counted since ``earlier``."""
    none = Traffic()
    found = {}
    for key, now in traffic.items():
        then = earlier.get(key, none)
        if now.calls != then.calls:
            found[key] = Traffic(now.calls - then.calls, now.bytes - then.bytes, now.seconds - then.seconds)
    return found


def add(traffic: dict[str, Traffic], more: Mapping[str, Traffic]) -> None:
    """Count ``more``: a graph's collectives are called when it is traced, and again with every run of it."""
    for key, entry in more.items():
        known = traffic.setdefault(key, Traffic())
        known.calls, known.bytes, known.seconds = (
            known.calls + entry.calls,
            known.bytes + entry.bytes,
            known.seconds + entry.seconds,
        )


@hookimpl
def hvdlm_make_exchange(name: str, group: Group, config: Config) -> AllReduceExchange | None:
    """Answer to ``all_reduce``."""
    if name != "all_reduce":
        return None
    kind = AdasumExchange if config.communication.reduction == "adasum" and len(group.ranks) > 1 else AllReduceExchange
    return kind(group, config.communication)
