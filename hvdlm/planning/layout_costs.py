"""Costs of the layouts of a search: memory and seconds as for any run, and a lower bound of the seconds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pluggy

from hvdlm.config import CommunicationConfig, Config
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.mesh import Mesh
from hvdlm.planning.closed_forms import Habits, predict_costs
from hvdlm.planning.hardware import Hardware
from hvdlm.planning.memory_fit import Fit, fit
from hvdlm.planning.same import Same
from hvdlm.planning.step_time import StepTime, equal_stages, machine_of, predict_time, resolved, stage_time, stage_works

_ROUNDING = 1e-9  # by which a bound lies below what rounding may give in another order of sums
_ONE_BUCKET = 2**62


@dataclass(frozen=True)
class LayoutCosts:
    """Implements ``Costs`` of the search for one model on one machine.

    Attributes:
        gpu_memory: bytes of a rank's device; None: the hardware's.
        check: returns whether a run with a configuration on a mesh would start.
        moments: state vectors of the optimizer.
    """

    manager: pluggy.PluginManager
    spec: ModelSpec
    hardware: Hardware
    gpu_memory: float | None
    check: Callable[[Config, Mesh], bool]
    moments: int
    habits: Habits
    _known: dict[tuple[object, ...], Any] = field(default_factory=dict)  # the searches for reasons ask again

    def valid(self, config: Config, mesh: Mesh) -> bool:
        """Return whether a run with this configuration would start."""
        return self.check(config, mesh)

    def fit(self, config: Config, mesh: Mesh) -> Fit:
        """Return the memory of the rank that needs most; without a limit where none is known."""
        fitted: Fit = self._once("fit", config, mesh, self._fit)
        return fitted

    def _fit(self, config: Config, mesh: Mesh) -> Fit:
        fits = []
        for stage in dict.fromkeys(equal_stages(Same(self.spec), mesh.pipeline, config.parallel.virtual_stages)):
            rank = mesh.rank_of(stage, mesh.tensor - 1)  # the last tensor rank has the larger shards
            costs = predict_costs(self.manager, resolved(config, self.hardware), self.spec, mesh, rank)
            if costs is not None:
                memory = self.gpu_memory or self.hardware.memory_bytes or math.inf
                fits.append(fit(costs, config, self.spec, mesh, self.hardware, memory))
        return max((one for one in fits if one is not None), key=lambda one: one.needed)

    def time(self, config: Config, mesh: Mesh) -> StepTime:
        """Return the predicted seconds of a step."""
        time: StepTime = self._once("time", config, mesh, self._time)
        return time

    def _once(self, name: str, config: Config, mesh: Mesh, compute: Callable[[Config, Mesh], Any]) -> Any:
        p, train, c = config.parallel, config.train, config.communication
        computed = (p.sequence, p.schedule, p.virtual_stages, train.micro_batch_size, train.activation_checkpointing)
        exchanged = (p.zero, c.exchange, c.compression.algorithm, c.bucket_bytes) if name != "bound" else ()
        key = (name, mesh, *computed, *exchanged)
        if key not in self._known:
            self._known[key] = compute(config, mesh)
        return self._known[key]

    def _time(self, config: Config, mesh: Mesh) -> StepTime:
        time = predict_time(config, self.spec, mesh, self.hardware, self.moments, self.habits)
        assert time is not None, self.spec.kind  # the command refuses unknown architectures
        return time

    def bound(self, config: Config, mesh: Mesh) -> float:
        """Return the seconds of the passes alone, whatever data ranks send to each other.

        In a pipeline, a stage starts when the stages before it have done a forward pass (of their first virtual stage),
        and after its last backward pass they do one, too. Stages that share cores are faster where others wait.
        """
        bound: float = self._once("bound", config, mesh, self._bound)
        return bound

    def _bound(self, config: Config, mesh: Mesh) -> float:
        config = resolved(
            replace(
                config,
                parallel=replace(config.parallel, zero=0),
                communication=CommunicationConfig(bucket_bytes=_ONE_BUCKET),
            ),
            self.hardware,
        )
        computation, network = machine_of(config, mesh, self.hardware)
        works = stage_works(config, self.spec, mesh, self.hardware, self.moments, self.habits)
        assert works is not None, self.spec.kind  # the command refuses unknown architectures
        distinct = {id(work): work for work in works}
        alone = {
            key: stage_time(replace(work, buckets=(), after=(), rounds=()), computation, network)
            for key, work in distinct.items()
        }
        stages = [alone[id(work)] for work in works]
        passes = [stage.forward + stage.backward for stage in stages]
        count = works[0].micro_batches
        cores, longest, before = self.hardware.cores_per_node, count * max(passes), 0.0
        share, factor = min(1.0, cores / network.per_node) if cores else 1.0, computation.rates.bubble_factor
        for stage, seconds in zip(stages, passes, strict=True):
            path = before + count * seconds
            if factor is None:
                longest = max(longest, share * path)
            else:
                longest = max(longest, (1 - factor) * count * max(passes) + factor * path)
            before += seconds * min(stage.shares)
        return (1 - _ROUNDING) * (longest + computation.overhead(count))
