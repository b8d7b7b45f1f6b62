"""Which part of every parameter a rank holds: a table from logical axis to mesh axis, and what follows from it.

As in GSPMD (Xu et al. 2021), a layer's sharding is not written into the layer: it follows from the names of its
parameters' axes. Initial values, checkpoints, memory estimates and the layers all read it here.
"""

from __future__ import annotations

from dataclasses import dataclass

from hvdlm.config import ParallelConfig
from hvdlm.models.spec import ModelSpec, ParamSpec
from hvdlm.parallel.flat_layout import LocalParam, Shard
from hvdlm.parallel.mesh import Mesh, bounds
from hvdlm.parallel.pipeline_stages import Stage, cut_into_stages

# Logical axis -> mesh axis. "hidden" is what a recurrent cell computes, "hidden_in" what it reads: all of it.
RULES = {"heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor", "hidden": "tensor"}


@dataclass(frozen=True)
class ModelShard:
    """What one rank computes of a model.

    Attributes:
        params: what it holds, in the order of its forward pass.
        stage: its pipeline stage.
        vocab: the model's vocabulary.
        tensor: ranks that share every layer of the stage.
        place: this rank's place among them.
        sequence: whether they also share the positions of what no layer splits (Korthikanti et al. 2022).
        tied: parameters that the first and the last stage both hold, their gradients to be summed.
    """

    params: tuple[LocalParam, ...]
    stage: Stage
    vocab: int
    tensor: int = 1
    place: int = 0
    sequence: bool = False
    tied: tuple[str, ...] = ()

    @property
    def layers(self) -> range:
        """The numbers of the layers that it computes."""
        return range(*self.stage.layers)

    def range_of(self, length: int) -> tuple[int, int]:
        """Return this rank's (first, last exclusive) of ``length`` elements of an axis that the tensor axis splits."""
        return bounds(length, self.tensor, self.place)


def mesh_axis(axis: str, spec: ModelSpec, tensor: int) -> str | None:
    """Return the mesh axis that splits the logical ``axis``; None: every rank holds all of it.

    Fewer key-value heads than ranks are held whole by all: a head can't be split.
    """
    if axis == "kv_heads" and spec.settings.kv_heads % tensor:
        return None
    return RULES.get(axis) if tensor > 1 else None


def model_shard(spec: ModelSpec, mesh: Mesh, rank: int, options: ParallelConfig) -> ModelShard:
    """Return what ``rank`` of ``mesh`` computes of ``spec``."""
    at = mesh.coordinates(rank)
    tensor, place = mesh.tensor, at["tensor"]
    stage = cut_into_stages(spec, mesh.pipeline)[at["pipeline"]]
    tied = tied_names(spec, mesh.pipeline)
    found = []
    for param in _of_stage(spec, stage, tied):
        shard, split = _shard(param, spec, tensor, place)
        again = param.name in tied and not stage.first
        found.append(LocalParam(param, shard, (split or place == 0) and not again))
    return ModelShard(tuple(found), stage, spec.settings.vocab, tensor, place, options.sequence and tensor > 1, tied)


def tied_names(spec: ModelSpec, pipeline: int) -> tuple[str, ...]:
    """Return the parameters that the first and the last of ``pipeline`` stages both need."""
    return ("embed.tokens",) if pipeline > 1 and getattr(spec.settings, "tie_embeddings", False) else ()


def _of_stage(spec: ModelSpec, stage: Stage, tied: tuple[str, ...]) -> list[ParamSpec]:
    here = [p for p in spec.params if stage.holds(p.name)]
    again = [p for p in spec.params if p.name in tied] if stage.last and not stage.first else []
    return here + again


def _shard(param: ParamSpec, spec: ModelSpec, tensor: int, place: int) -> tuple[Shard, bool]:
    start, extent, split = [], [], False
    for length, axis in zip(param.shape, param.axes, strict=True):
        cut_here = mesh_axis(axis, spec, tensor) == "tensor"
        low, high = bounds(length, tensor, place) if cut_here else (0, length)
        start.append(low)
        extent.append(high - low)
        split = split or cut_here
    return Shard(param.shape, tuple(start), tuple(extent)), split
