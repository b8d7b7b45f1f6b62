"""Search of the fastest layout of a run: the mesh, ZeRO, micro-batches, recomputation, buckets, and lossy exchanges.

Every combination of options is considered, so that the first result is the fastest there is by the prediction. What
can't be among the results is left out before its time is predicted: layouts that a run would refuse, that don't fit the
memory, or whose lower bound is above the results so far.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from hvdlm.config import Config
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.mesh import Mesh

if TYPE_CHECKING:
    from hvdlm.planning.memory_fit import Fit
    from hvdlm.planning.step_time import StepTime

BUCKETS = (1_000_000, 4_000_000, 16_000_000, 64_000_000, 256_000_000)
"""Values of ``communication.bucket_bytes`` that are considered beside the given one."""

LOSSY = ("communication.exchange", "communication.compression.algorithm")
"""Options that change the result of a run: they are searched only where that is asked for."""

Options = Mapping[str, Any]
"""Values of the searched options, by their full names."""


class Costs(Protocol):
    """What the search asks about a layout."""

    def valid(self, config: Config, mesh: Mesh) -> bool:
        """Return whether a run with this configuration would start."""

    def fit(self, config: Config, mesh: Mesh) -> Fit:
        """Return the memory that the largest rank needs beside what there is."""

    def bound(self, config: Config, mesh: Mesh) -> float:
        """Return seconds that a step takes at least, whatever its exchange, ZeRO stage and buckets are."""

    def time(self, config: Config, mesh: Mesh) -> StepTime:
        """Return the predicted seconds of a step."""


@dataclass(frozen=True)
class Layout:
    """A layout with its predicted costs.

    Attributes:
        options: the values of the searched options.
        config: the given configuration with them.
        tokens_per_second: of all ranks.
    """

    options: Options
    config: Config
    mesh: Mesh
    time: StepTime
    fit: Fit

    @property
    def tokens_per_second(self) -> float:
        """Predicted tokens of all ranks in a second."""
        return self.config.train.batch_size * self.config.data.context / self.time.seconds


@dataclass(frozen=True)
class Space:
    """The values that are considered of every option, in the order in which equal layouts are preferred.

    ``data``: the data-parallel ranks, where they are given; ``micro_batches``: whether ``train.micro_batch_size`` is
    searched, over all divisors of a rank's sequences; ``data_per_node``: that of all meshes.
    """

    ranks: int
    choices: Mapping[str, Sequence[Any]]
    data: int | None = None
    micro_batches: bool = True
    data_per_node: int = 1

    def only(self, option: str, value: Any) -> Space:
        """Return the space in which ``option`` is ``value``; empty where that isn't among its values."""
        values = [value] if value in self.choices[option] else []
        return replace(self, choices={**self.choices, option: values})


def make_space(
    config: Config, spec: ModelSpec, ranks: int, fixed: Collection[str] = (), lossy: Mapping[str, Sequence[str]] = {}
) -> Space:
    """Return the values to consider for ``ranks`` ranks.

    Args:
        config: the given configuration, whose values of the options that are ``fixed`` stay.
        lossy: the exchanges and compressors to consider beside the given ones, by option (``LOSSY``).
    """
    p, c = config.parallel, config.communication
    sizes = [size for size in range(1, ranks + 1) if ranks % size == 0]
    recomputes = spec.kind in ("gpt", "rnn")
    choices: dict[str, Sequence[Any]] = {
        "parallel.pipeline": [size for size in sizes if size <= spec.settings.layers],
        "parallel.tensor": sizes,
        "parallel.sequence": [False, True] if spec.kind == "gpt" else [False],
        "train.activation_checkpointing": [False, True] if recomputes else [False],
        "parallel.zero": [0, 1, 2, 3] if spec.kind == "gpt" else [0, 1, 2],
        "communication.exchange": _first(c.exchange, lossy.get(LOSSY[0], ())),
        "communication.compression.algorithm": _first(c.compression.algorithm, lossy.get(LOSSY[1], ())),
        "communication.bucket_bytes": _first(c.bucket_bytes, BUCKETS),
    }
    given = {name: value_of(config, name) for name in choices}
    choices |= {name: [given[name]] for name in choices if name in fixed}
    data = p.data if "parallel.data" in fixed else None
    return Space(ranks, choices, data, "train.micro_batch_size" not in fixed, p.data_per_node)


def _first(given: Any, others: Sequence[Any]) -> list[Any]:
    return list(dict.fromkeys([given, *others]))


def value_of(config: Config, name: str) -> Any:
    """Return the value of an option by its full name."""
    value: Any = config
    for part_name in name.split("."):
        value = getattr(value, part_name)
    return value


def search(config: Config, space: Space, costs: Costs, count: int = 10, limited: bool = True) -> list[Layout]:
    """Return the fastest layout of each of the ``count`` fastest meshes, the fastest first.

    ``limited``: of the layouts that fit the memory; else of all. Of equally fast layouts, the plainest comes first.
    """
    best = _Best(count)
    for bound, group in sorted(_groups(config, space, costs), key=lambda pair: pair[0]):
        if best.may_enter(group.mesh, bound):
            for number, options in enumerate(_exchanges(space, group.mesh)):
                _try(config, {**group.options, **options}, group.mesh, (group.number, number), costs, limited, best)
    return best.ranked()


class _Group(NamedTuple):
    """Layouts that compute alike, and communicate differently along the data axis."""

    number: int
    mesh: Mesh
    options: Options


class _Best:
    """The fastest layout of each mesh so far."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._layouts: dict[Mesh, tuple[float, tuple[int, int], Layout]] = {}

    def may_enter(self, mesh: Mesh, bound: float) -> bool:
        """Return whether a layout that takes ``bound`` seconds could be the best of ``mesh``, and among the results."""
        own = self._layouts.get(mesh)
        if own is not None and bound > own[0]:
            return False
        others = heapq.nsmallest(self._count, (entry[0] for m, entry in self._layouts.items() if m != mesh))
        return len(others) < self._count or bound <= others[-1]

    def is_better(self, number: tuple[int, int], layout: Layout) -> bool:
        """Return whether a layout is the best of its mesh; ``number``: its rank among equally fast ones."""
        own = self._layouts.get(layout.mesh)
        return own is None or (layout.time.seconds, number) < own[:2]

    def add(self, number: tuple[int, int], layout: Layout) -> None:
        """Keep the best layout of its mesh."""
        self._layouts[layout.mesh] = layout.time.seconds, number, layout

    def ranked(self) -> list[Layout]:
        """Return the results."""
        return [layout for *_, layout in sorted(self._layouts.values(), key=lambda e: e[:2])[: self._count]]


def _try(
    config: Config, options: Options, mesh: Mesh, number: tuple[int, int], costs: Costs, limited: bool, best: _Best
) -> None:
    """Predict a layout, and add it to ``best`` where it fits and is valid: that takes longest to check."""
    candidate = with_options(config, options)
    fit = costs.fit(candidate, mesh)
    if fit.fits or not limited:
        layout = Layout(options, candidate, mesh, costs.time(candidate, mesh), fit)
        if best.is_better(number, layout) and costs.valid(candidate, mesh):
            best.add(number, layout)


def _groups(config: Config, space: Space, costs: Costs) -> Iterator[tuple[float, _Group]]:
    """Yield the groups with a valid layout, each with its lower bound of seconds."""
    number = 0
    for mesh in meshes(space):
        for options in _computations(config, space, mesh):
            candidates = (with_options(config, {**options, **exchange}) for exchange in _exchanges(space, mesh))
            valid = next((candidate for candidate in candidates if costs.valid(candidate, mesh)), None)
            if valid is not None:
                yield costs.bound(valid, mesh), _Group(number, mesh, options)
                number += 1


def smallest_fits(config: Config, space: Space, costs: Costs) -> dict[Mesh, Fit]:
    """Return of each mesh with a valid layout the least memory that one of its smallest micro-batches needs."""
    smallest: dict[Mesh, Fit] = {}
    for mesh in meshes(space):
        options = list(_computations(config, space, mesh))
        for computation, exchange in product(options, _exchanges(space, mesh)):
            if computation["train.micro_batch_size"] == options[-1]["train.micro_batch_size"]:
                candidate = with_options(config, {**computation, **exchange})
                fit = costs.fit(candidate, mesh) if costs.valid(candidate, mesh) else None
                if fit and (mesh not in smallest or fit.needed < smallest[mesh].needed):
                    smallest[mesh] = fit
    return smallest


def meshes(space: Space) -> Iterator[Mesh]:
    """Yield the meshes of the space, those with the fewest tensor and pipeline ranks first."""
    for tensor, pipeline in product(space.choices["parallel.tensor"], space.choices["parallel.pipeline"]):
        if space.ranks % (tensor * pipeline) == 0:
            data = space.ranks // (tensor * pipeline)
            if space.data in (None, data) and data % space.data_per_node == 0:
                yield Mesh(data, pipeline, tensor, space.data_per_node)


def _computations(config: Config, space: Space, mesh: Mesh) -> Iterator[dict[str, Any]]:
    """Yield the options that decide what a rank computes."""
    if config.train.batch_size % mesh.data:
        return
    rows = config.train.batch_size // mesh.data
    sizes: Sequence[int | None] = [config.train.micro_batch_size]
    if space.micro_batches:  # the largest first; null is the whole batch of a rank
        sizes = [None, *(n for n in range(rows - 1, 0, -1) if rows % n == 0)]
    sequences = space.choices["parallel.sequence"][: None if mesh.tensor > 1 else 1]
    for sequence, recompute, size in product(sequences, space.choices["train.activation_checkpointing"], sizes):
        yield {
            "parallel.data": mesh.data,
            "parallel.pipeline": mesh.pipeline,
            "parallel.tensor": mesh.tensor,
            "parallel.sequence": sequence,
            "train.activation_checkpointing": recompute,
            "train.micro_batch_size": size,
        }


def _exchanges(space: Space, mesh: Mesh) -> Iterator[dict[str, Any]]:
    """Yield the options that decide how data ranks communicate; one rank alone has the first of each."""
    names = ("parallel.zero", *LOSSY, "communication.bucket_bytes")
    values = [space.choices[name][: None if mesh.data > 1 else 1] for name in names]
    for combination in product(*values):
        options = dict(zip(names, combination, strict=True))
        # ZeRO-3 has buckets of its own; stages can't gather layer by layer.
        first = mesh.pipeline == 1 and combination[-1] == values[-1][0]
        if options["parallel.zero"] < 3 or first:
            yield options


def with_options(config: Any, options: Options) -> Any:
    """Return ``config`` with other values of ``options``, whose names are full."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        section, _, rest = name.partition(".")
        sections.setdefault(section, {})[rest] = value
    changed: dict[str, Any] = {}
    for section, values in sections.items():
        own = {name: value for name, value in values.items() if "." not in name}
        nested = {name: value for name, value in values.items() if "." in name}
        part_of_config = replace(getattr(config, section), **own)
        changed[section] = with_options(part_of_config, nested) if nested else part_of_config
    return replace(config, **changed)
