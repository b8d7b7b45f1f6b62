"""The groups of ranks that compute one copy of the model together."""

from __future__ import annotations

from dataclasses import dataclass, field

from hvdlm.communication.traffic import TrafficCounters
from hvdlm.diagnostics.flight_recorder import FlightRecorder
from hvdlm.parallel.mesh import Mesh
from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm.protocols.exchange import Exchange
from hvdlm.protocols.group import Group
from hvdlm.protocols.world import World
from hvdlm_language.context_ranks import ContextRanks, make_context_ranks


@dataclass(frozen=True)
class Axes:
    """A rank's groups, but for that of the data axis, which belongs to the exchange.

    Attributes:
        tensor: the ranks that compute every layer together with this one.
        model: all ranks that hold one copy of the model together with this one.
        before, after: this rank and its neighbour in the previous, or next, stage; None: there is no such stage. With
            virtual stages, the first stage follows the last one.
        ends: the ranks of the first and the last stage; None in the stages between them, or with one stage.
        context: the ranks that have other positions of the same rows; None: this rank has all positions.
        recorder: the flight recorder of this rank's collectives.
    """

    tensor: Group
    model: Group
    before: Group | None = None
    after: Group | None = None
    ends: Group | None = None
    context: ContextRanks | None = None
    recorder: FlightRecorder = field(default_factory=FlightRecorder)


def make_axes(world: World, mesh: Mesh, model_shard: ModelShard) -> Axes:
    """Return the groups of this rank of ``world``."""
    rank, stage = world.rank, model_shard.stage
    tensor, model = world.group(mesh.group("tensor", rank)), world.group(mesh.model_group(rank))
    context = make_context_ranks(world, mesh)
    if stage.count == 1:
        return Axes(tensor, model, context=context, recorder=world.recorder)
    ring = bool(model_shard.virtual)
    before = None if stage.first and not ring else world.group(mesh.pair(rank, stage.number - 1))
    after = None if stage.last and not ring else world.group(mesh.pair(rank, stage.number))
    ends = world.group(mesh.pair(rank, stage.count - 1)) if stage.first or stage.last else None
    return Axes(tensor, model, before, after, ends, context, world.recorder)


def count_traffic(axes: Axes, exchange: Exchange) -> TrafficCounters:
    """Return the counters of all groups that a training step uses."""
    groups = [axes.tensor, axes.model, axes.before, axes.after, axes.ends]
    groups += axes.context.groups if axes.context else []
    counters = [exchange.traffic, *(group.traffic for group in groups if group is not None)]
    return TrafficCounters(counters, axes.recorder)
