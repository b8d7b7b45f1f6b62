"""Sharding rules: a table from logical axis to mesh axis, and the shard of every parameter that a rank holds.

As in GSPMD (Xu et al. 2021), a layer's sharding is not written into the layer: it follows from the names of its
parameters' axes. Initial values, checkpoints, memory estimates and the layers all use this table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hvdlm.config import ParallelConfig
from hvdlm.models.spec import ModelSpec, ParamSpec
from hvdlm.parallel.flat_layout import LocalParam, Shard
from hvdlm.parallel.mesh import Mesh, bounds
from hvdlm.parallel.pipeline_stages import Stage, cut_into_stages, stage_of_rank

# Logical axis -> mesh axis. "hidden" is a recurrent cell's output, which is split; its input "hidden_in" is not.
RULES = {"heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor", "hidden": "tensor"}


@dataclass(frozen=True)
class ModelShard:
    """The shard of a model that one rank holds and computes.

    Attributes:
        params: its parameters, in the order of the forward pass.
        stage: its pipeline stage.
        vocab: the model's vocabulary.
        tensor: number of ranks that compute every layer of the stage together.
        index: this rank's index among them.
        sequence: whether they also shard the positions between layers (Korthikanti et al. 2022).
        tied: parameters that both the first and the last stage hold; their gradients are summed.
        virtual: the shards of the rank's virtual stages, which are stages of their own; empty: it has one stage.
    """

    params: tuple[LocalParam, ...]
    stage: Stage
    vocab: int
    tensor: int = 1
    index: int = 0
    sequence: bool = False
    tied: tuple[str, ...] = ()
    virtual: tuple[ModelShard, ...] = ()

    @property
    def layers(self) -> tuple[int, ...]:
        """The indices of its layers."""
        return self.stage.layers

    @property
    def chunks(self) -> tuple[ModelShard, ...]:
        """The shards that are computed one after the other: itself, or those of its virtual stages."""
        return self.virtual or (self,)

    def range_of(self, length: int) -> tuple[int, int]:
        """Return this rank's (first, last exclusive) of ``length`` elements of an axis that the tensor axis splits."""
        return bounds(length, self.tensor, self.index)


def mesh_axis(axis: str, spec: ModelSpec, tensor: int) -> str | None:
    """Return the mesh axis that splits the logical ``axis``; None: every rank holds all of it.

    Where key-value heads don't divide over the ranks, every rank holds all of them: a head can't be split.
    """
    if axis == "kv_heads" and spec.settings.kv_heads % tensor:
        return None
    return RULES.get(axis) if tensor > 1 else None


def make_model_shard(spec: ModelSpec, mesh: Mesh, rank: int, options: ParallelConfig) -> ModelShard:
    """Return the shard of ``spec`` that ``rank`` of ``mesh`` computes."""
    coordinates = mesh.coordinates(rank)
    tensor, index = mesh.tensor, coordinates["tensor"]
    virtual_stages = options.virtual_stages if mesh.pipeline > 1 else 1
    stages = cut_into_stages(spec, mesh.pipeline * virtual_stages)
    stage = stage_of_rank(stages, mesh.pipeline, coordinates["pipeline"])
    tied = tied_names(spec, mesh.pipeline)
    params = []
    for param in _params_of(spec, stage, tied):
        shard, split = _shard(param, spec, tensor, index)
        # The global gradient norm counts every element once: of a whole copy on all tensor ranks that of the first one,
        # of a tied parameter that of the first stage.
        second_copy = param.name in tied and not stage.first
        params.append(LocalParam(param, shard, (split or index == 0) and not second_copy))
    sequence = options.sequence and tensor > 1
    whole = ModelShard(tuple(params), stage, spec.settings.vocab, tensor, index, sequence, tied)
    if virtual_stages == 1:
        return whole
    own = stages[stage.number :: stage.count]
    names = [{param.name for param in _params_of(spec, one, tied)} for one in own]
    shards = [tuple(param for param in params if param.spec.name in held) for held in names]
    virtual = (replace(whole, params=held, stage=one) for held, one in zip(shards, own, strict=True))
    return replace(whole, virtual=tuple(virtual))


def tied_names(spec: ModelSpec, pipeline: int) -> tuple[str, ...]:
    """Return the parameters that the first and the last of ``pipeline`` stages both need."""
    return ("embed.tokens",) if pipeline > 1 and getattr(spec.settings, "tie_embeddings", False) else ()


def _params_of(spec: ModelSpec, stage: Stage, tied: tuple[str, ...]) -> list[ParamSpec]:
    params = [p for p in spec.params if stage.holds(p.name)]
    if stage.last and not stage.first:
        params += [p for p in spec.params if p.name in tied]
    return params


def _shard(param: ParamSpec, spec: ModelSpec, tensor: int, index: int) -> tuple[Shard, bool]:
    """Return the shard of a parameter on tensor rank ``index``, and whether it is split at all."""
    start, extent, split = [], [], False
    for length, axis in zip(param.shape, param.axes, strict=True):
        split_here = mesh_axis(axis, spec, tensor) == "tensor"
        low, high = bounds(length, tensor, index) if split_here else (0, length)
        start.append(low)
        extent.append(high - low)
        split = split or split_here
    return Shard(param.shape, tuple(start), tuple(extent)), split
