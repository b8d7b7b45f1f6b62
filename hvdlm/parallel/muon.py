"""Muon (Jordan et al. 2024): which parameters it updates, and what a rank holds, needs and sends of them.

The momentum of a hidden matrix is replaced by the nearest orthogonal one, approximated by Newton-Schulz iterations
(https://kellerjordan.github.io/posts/muon/), and scaled as in Liu et al. 2025 (arXiv:2502.16982, section 2.2), so that
learning rate and weight decay are those of AdamW::

    m = momentum m + g                              # as SGD's
    u = g + momentum m                              # Nesterov
    x = u / |u|                                     # Frobenius norm; transposed where rows > columns
    x = a x + (b (x x^T) + c (x x^T)^2) x           # 5 times
    p = p - rate (0.2 sqrt(max(rows, columns)) x + decay p)

An orthogonalization needs whole matrices: the momentum of matrices that tensor ranks shard, or that the shards of ZeRO
cut, is gathered, and every rank keeps its own elements of the result.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from hvdlm.config import TrainConfig
from hvdlm.errors import HvdlmError
from hvdlm.models.spec import ModelSpec, ParamSpec
from hvdlm.parallel.flat_layout import Elements, FlatLayout, Slot
from hvdlm.parallel.mesh import bounds
from hvdlm.parallel.parameter_groups import ParameterGroups

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b and c of an iteration."""

ITERATIONS = 5

EPSILON = 1e-7
"""Added to the norm, so that a gradient of zeros stays one."""

_NOT_HIDDEN = {"vocab", "position", "gates"}  # axes of embeddings, output layers and the biases of recurrent cells
_LONG = 65536  # elements from which on an update by AdamW in the parameter's own memory is faster than in a copy


def scale_of(shape: tuple[int, ...]) -> float:
    """Return the factor of an orthogonal matrix by which its elements are as large as those of AdamW's updates."""
    return 0.2 * math.sqrt(max(shape))


def names_of(spec: ModelSpec, options: TrainConfig) -> frozenset[str]:
    """Return the parameters that Muon updates; none with another optimizer.

    By default those are matrices but for embeddings and output layers; ``muon`` of a parameter group overrides it.
    """
    if options.optimizer != "muon":
        return frozenset()
    groups = ParameterGroups(options)
    chosen = {param.name: groups.of(param.name).muon for param in spec.params}
    return frozenset(
        param.name
        for param in spec.params
        if len(param.shape) == 2 and (is_hidden(param) if chosen[param.name] is None else chosen[param.name])
    )


def is_hidden(param: ParamSpec) -> bool:
    """Return whether a parameter is a matrix between hidden units."""
    return len(param.shape) == 2 and not _NOT_HIDDEN & set(param.axes)


def check(options: TrainConfig, spec: ModelSpec) -> None:
    """Check that there is something to orthogonalize.

    Raises:
        HvdlmError: the model has no such matrices.
    """
    if options.optimizer == "muon" and not names_of(spec, options):
        raise HvdlmError(
            f"train.optimizer muon orthogonalizes hidden matrices [inputs, outputs], and this {spec.kind} has none: "
            "choose adamw."
        )


@dataclass(frozen=True)
class Matrix:
    """A matrix whose momentum is orthogonalized.

    Attributes:
        slot: this rank's elements in the flat vector: all, or a tensor rank's shard.
        lengths: of every tensor rank's shard, along ``axis``; empty: the rank holds the whole matrix.
        axis: the dimension that tensor ranks shard.
    """

    slot: Slot
    lengths: tuple[int, ...] = ()
    axis: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole matrix's shape."""
        return self.slot.shard.shape

    def shape_on(self, rank: int) -> tuple[int, ...]:
        """Return the shape of the shard of tensor rank ``rank``."""
        rows, columns = self.shape
        return (self.lengths[rank], columns) if self.axis == 0 else (rows, self.lengths[rank])


class MuonLayout:
    """The elements of one rank by the rule that updates them.

    Attributes:
        owned: elements of matrices in the vector that this rank updates, in its order.
        short, long: all others in it, those of AdamW.
        matrices: all matrices of which this rank holds a shard, in the order of the flat vector.
        sharded: those of them that tensor ranks shard.
        needed: those of them of which this rank updates something.
        matrix_buckets, buckets: the bucket of every matrix, and these buckets, each once.
        zero_size: ranks that update a shard each (ZeRO).
    """

    def __init__(
        self, layout: FlatLayout, names: Collection[str], zero_rank: int = 0, zero_size: int = 1, tensor: int = 1
    ) -> None:
        updated = layout.zero_slots(zero_rank, zero_size)
        self.owned = [elements for elements in updated if elements[0].name in names]
        others = [elements for elements in updated if elements[0].name not in names]
        self.short = [elements for elements in others if count([elements]) < _LONG]
        self.long = [elements for elements in others if count([elements]) >= _LONG]
        self.matrices = [_matrix(slot, tensor) for slot in layout.slots if slot.name in names]
        self.sharded = [matrix for matrix in self.matrices if matrix.lengths]
        owned = {slot.name for slot, _, _ in self.owned}
        self.needed = [matrix for matrix in self.matrices if matrix.slot.name in owned]
        of_slots = {slot.name: i for i, (a, b) in enumerate(layout.buckets) for slot in layout.slots[a:b]}
        self.matrix_buckets = [of_slots[matrix.slot.name] for matrix in self.matrices]
        self.buckets = sorted(set(self.matrix_buckets))
        self.zero_size = zero_size

    def state_elements(self, kind: str) -> list[Elements]:
        """Return the elements that the optimizer's state ``kind`` consists of, which it holds one after the other."""
        chosen = self.owned if kind == "momentum" else [*self.short, *self.long]
        elements, start = [], 0
        for slot, _, (first, last) in chosen:
            elements.append((slot, start, (first, last)))
            start += last - first
        return elements

    def alike(self) -> list[list[Matrix]]:
        """Return the needed matrices by shape and sharded dimension, which are orthogonalized together."""
        groups: dict[object, list[Matrix]] = {}
        for matrix in self.needed:
            groups.setdefault((matrix.shape, matrix.lengths, matrix.axis), []).append(matrix)
        return list(groups.values())


def count(elements: Collection[Elements]) -> int:
    """Return the number of all elements."""
    return sum(last - first for _, _, (first, last) in elements)


def _matrix(slot: Slot, tensor: int) -> Matrix:
    shard = slot.shard
    axis = next((axis for axis in (0, 1) if shard.extent[axis] != shard.shape[axis]), None)
    if axis is None:
        return Matrix(slot)
    ends = [bounds(shard.shape[axis], tensor, rank) for rank in range(tensor)]
    return Matrix(slot, tuple(stop - start for start, stop in ends), axis)
