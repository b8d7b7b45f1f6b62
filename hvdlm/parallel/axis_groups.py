"""The ranks with which a rank shares a model, and what all their collectives moved."""

from __future__ import annotations

from dataclasses import dataclass, field

from hvdlm.communication.traffic import add, since, snapshot
from hvdlm.diagnostics.flight_recorder import FlightRecorder
from hvdlm.parallel.mesh import Mesh
from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm.protocols.exchange import Exchange
from hvdlm.protocols.group import Group
from hvdlm.protocols.types import Traffic
from hvdlm.protocols.world import World


@dataclass(frozen=True)
class Axes:
    """A rank's groups besides that of the data axis, which the exchange has.

    Attributes:
        tensor: the ranks that share every layer with this one.
        model: all that hold a copy of the model together with this one.
        before, after: this rank and the one of the stage before, or after; None: there is no such stage.
        ends: the ranks of the first and the last stage; None in the stages between them, or where there is one stage.
        ledger: where this rank's collectives are written down.
    """

    tensor: Group
    model: Group
    before: Group | None = None
    after: Group | None = None
    ends: Group | None = None
    recorder: FlightRecorder = field(default_factory=FlightRecorder)


def make_axes(world: World, mesh: Mesh, model_shard: ModelShard) -> Axes:
    """Return the groups of this rank of ``world``."""
    rank, stage = world.rank, model_shard.stage
    tensor, model = world.group(mesh.group("tensor", rank)), world.group(mesh.model_group(rank))
    if stage.count == 1:
        return Axes(tensor, model, recorder=world.recorder)
    before = None if stage.first else world.group(mesh.pair(rank, stage.number - 1))
    after = None if stage.last else world.group(mesh.pair(rank, stage.number))
    ends = world.group(mesh.pair(rank, stage.count - 1)) if stage.first or stage.last else None
    return Axes(tensor, model, before, after, ends, world.recorder)


class TrafficCounters:
    """The counters of all groups that a training step uses, as one: a group may serve several axes; and the ledger."""

    def __init__(self, axes: Axes, exchange: Exchange) -> None:
        self.recorder = axes.recorder
        groups = (axes.tensor, axes.model, axes.before, axes.after, axes.ends)
        counters = [exchange.traffic, *(group.traffic for group in groups if group is not None)]
        self._counters = list({id(counter): counter for counter in counters}.values())

    def snapshot(self) -> list[dict[str, Traffic]]:
        """Return the counters as they stand."""
        return [snapshot(counter) for counter in self._counters]

    def since(self, earlier: list[dict[str, Traffic]]) -> list[dict[str, Traffic]]:
        """Return what has been counted since ``earlier``."""
        return [since(counter, before) for counter, before in zip(self._counters, earlier, strict=True)]

    def restore(self, earlier: list[dict[str, Traffic]]) -> None:
        """Forget what has been counted since ``earlier``."""
        for counter, before in zip(self._counters, earlier, strict=True):
            counter.clear()
            counter.update(before)

    def add(self, more: list[dict[str, Traffic]]) -> None:
        """Count ``more``."""
        for counter, part in zip(self._counters, more, strict=True):
            add(counter, part)

    def waited(self, moved: list[dict[str, Traffic]], seconds: float) -> None:
        """Add the seconds of a whole step to the first kind of collective in ``moved`` that isn't the metrics'."""
        for counter, part in zip(self._counters, moved, strict=True):
            for key in part:
                if not key.startswith("metrics"):
                    counter[key].seconds += seconds
                    return

    def traffic(self) -> dict[str, Traffic]:
        """Return the counters of all groups by ``purpose/operation``."""
        found: dict[str, Traffic] = {}
        for counter in self._counters:
            add(found, counter)
        return found
