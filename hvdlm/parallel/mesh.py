"""Ranks on a (data, pipeline, context, tensor) mesh, and the groups of ranks along each axis."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

from hvdlm.config import ParallelConfig
from hvdlm.errors import HvdlmError

AXES = ("data", "pipeline", "tensor")
"""The axes of a mesh without context ranks; with them, there is ``context`` before ``tensor``."""


@dataclass(frozen=True)
class Mesh:
    """The ranks as a box; rank r has the coordinates of element r in row-major order.

    The tensor axis is the last, so that its ranks are neighbours, which launchers place on one node. The context axis
    comes before it, since its ranks exchange keys and values in every layer (Llama Team 2024, section 3.3.2).
    ``data_per_node``: as many consecutive ranks of the data axis are a level of their own; 1: there are no levels.
    """

    data: int
    pipeline: int
    tensor: int
    data_per_node: int = 1
    context: int = 1

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of its axes: ``context`` among them only where there are context ranks."""
        return AXES if self.context == 1 else (*AXES[:2], "context", AXES[2])

    @property
    def shape(self) -> tuple[int, ...]:
        """Ranks along ``axes``."""
        return tuple(getattr(self, axis) for axis in self.axes)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.data * self.pipeline * self.context * self.tensor

    @property
    def replicas(self) -> int:
        """Number of ranks that hold the same parameters and sum their gradients: data x context."""
        return self.data * self.context

    @property
    def has_levels(self) -> bool:
        """Whether the data axis has two levels: several nodes, with several of its ranks each."""
        return 1 < self.data_per_node < self.data

    def coordinates(self, rank: int) -> dict[str, int]:
        """Return {axis: index of ``rank`` along it}."""
        rest, tensor = divmod(rank, self.tensor)
        rest, context = divmod(rest, self.context)
        data, pipeline = divmod(rest, self.pipeline)
        return {"data": data, "pipeline": pipeline, "context": context, "tensor": tensor}

    def group(self, axis: str, rank: int) -> tuple[int, ...]:
        """Return the ranks that differ from ``rank`` at most along ``axis``, in order of their index on it."""
        here = self.coordinates(rank)
        return tuple(self._rank({**here, axis: index}) for index in range(getattr(self, axis)))

    def replica_group(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that hold the parameters of ``rank``, among which gradients are summed: data x context."""
        here = self.coordinates(rank)
        return tuple(
            self._rank({**here, "data": data, "context": context})
            for data, context in product(range(self.data), range(self.context))
        )

    def model_group(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that together hold one copy of the model: with the data and context indices of ``rank``."""
        here = self.coordinates(rank)
        return tuple(
            self._rank({**here, "pipeline": pipeline, "tensor": tensor})
            for pipeline, tensor in product(range(self.pipeline), range(self.tensor))
        )

    def rank_of(self, stage: int, tensor: int = 0) -> int:
        """Return the first rank that computes shard ``tensor`` of ``stage``."""
        return self._rank({"data": 0, "pipeline": stage, "context": 0, "tensor": tensor})

    def pair(self, rank: int, stage: int) -> tuple[int, int]:
        """Return the ranks of ``stage`` and of the one after it (the last one's: the first) in the line of ``rank``."""
        return self._neighbours("pipeline", rank, stage)

    def hop(self, rank: int, index: int) -> tuple[int, int]:
        """Return context rank ``index`` and the one after it (the last one's: the first) in the ring of ``rank``."""
        return self._neighbours("context", rank, index)

    def _neighbours(self, axis: str, rank: int, index: int) -> tuple[int, int]:
        line = self.group(axis, rank)
        a, b = line[index], line[(index + 1) % len(line)]
        return (min(a, b), max(a, b))

    def groups(self) -> list[tuple[int, ...]]:
        """Return all groups of two ranks or more, each once: the same list on every rank."""
        groups: dict[tuple[int, ...], None] = {}
        for axis, rank in product(AXES, range(self.size)):
            groups.setdefault(self.replica_group(rank) if axis == "data" else self.group(axis, rank))
        for rank in range(self.size):
            groups.setdefault(self.model_group(rank))
            for level in levels(self.group("data", rank), rank, self.data_per_node) if self.data_per_node > 1 else ():
                groups.setdefault(level)
        if self.pipeline > 1:
            for rank, stage in product(range(self.size), range(self.pipeline)):
                groups.setdefault(self.pair(rank, stage))
        if self.context > 1:
            for rank, index in product(range(self.size), range(self.context)):
                groups.setdefault(self.group("context", rank))
                groups.setdefault(self.hop(rank, index))
        return [ranks for ranks in groups if len(ranks) > 1]

    def _rank(self, at: dict[str, int]) -> int:
        return ((at["data"] * self.pipeline + at["pipeline"]) * self.context + at["context"]) * self.tensor + at[
            "tensor"
        ]


def make_mesh(size: int, config: ParallelConfig) -> Mesh:
    """Return the mesh of ``size`` ranks that ``config`` asks for.

    Raises:
        HvdlmError: the axes don't multiply to ``size``; the sentence lists the shapes that do.
    """
    model = config.pipeline * config.context * config.tensor
    data = config.data if config.data is not None else max(1, size // model)
    mesh = Mesh(data, config.pipeline, config.tensor, config.data_per_node, config.context)
    if mesh.size != size:
        shape, axes = " x ".join(map(str, mesh.shape)), " x ".join(mesh.axes)
        if size % config.context:
            raise HvdlmError(
                f"parallel: {shape} ({axes}) is not the {size} rank(s) that were started: set parallel.context to one "
                f"of {', '.join(str(n) for n in range(1, size + 1) if size % n == 0)}."
            )
        left = size // config.context  # for the other axes
        fits = [Mesh(d, p, t, context=config.context) for d, p, t in product(range(1, left + 1), repeat=3)]
        possible = ["x".join(map(str, fit.shape)) for fit in fits if fit.size == size]
        raise HvdlmError(
            f"parallel: {shape} ({axes}) is not the {size} rank(s) that were started; possible: "
            f"{', '.join(possible[:24])}."
        )
    if data % config.data_per_node:
        raise HvdlmError(
            f"parallel.data_per_node {config.data_per_node} doesn't divide the {data} data-parallel rank(s): choose "
            f"one of {', '.join(str(n) for n in range(1, data + 1) if data % n == 0)}."
        )
    return mesh


def fitted(config: ParallelConfig, size: int) -> ParallelConfig:
    """Return the layout in which ``size`` ranks use a model that was trained in the layout ``config``.

    Ranks that can hold whole copies of its shards do, with as many data ranks as that makes; others are data ranks,
    each with the whole model (or its shards of the parameters, with ZeRO-3).
    """
    model = config.pipeline * config.context * config.tensor
    if size % model:
        return ParallelConfig(zero=config.zero, zero_gather=config.zero_gather)
    data = size // model
    return replace(config, data=data, data_per_node=1 if data % config.data_per_node else config.data_per_node)


def levels(line: tuple[int, ...], rank: int, per_node: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ranks of a data axis's ``line`` on the node of ``rank``, and those in its place on every node."""
    index = line.index(rank)
    first = index - index % per_node
    return line[first : first + per_node], line[index % per_node :: per_node]


def bounds(length: int, size: int, index: int) -> tuple[int, int]:
    """Return (first, last exclusive) of shard ``index`` of ``size``, which differ by one element at most."""
    return index * length // size, (index + 1) * length // size
