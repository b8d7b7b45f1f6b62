"""Parameters that are gathered layer by layer (ZeRO-3), as in FSDP (Zhao et al. 2023, section 3.3).

A layer's parameters are views of one buffer, whose storage has no memory but while the layer computes: what autograd
keeps for the backward pass are views, too, and find their values there again when the layer is gathered for it. While a
layer computes, the next one of the forward or the backward pass is on its way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from hvdlm.parallel.flat_layout import Slot
from hvdlm.parallel.held_bytes import HeldBytes
from hvdlm.parallel.layer_units import EMBEDDING, HEAD, Unit, units_of
from hvdlm.parallel.sharded_state import ShardedState
from hvdlm.protocols.group import Handle


class WholeLayers:
    """All layers' parameters are there: a model without ZeRO-3 has nothing to gather."""

    def enter(self, x: Any, name: str) -> Any:
        """Return ``x``."""
        return x

    def leave(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Return ``x``."""
        return x

    def share(self, tensors: Iterable[torch.Tensor]) -> None:
        """Take note of ``tensors`` that all layers use, of the forward pass that begins."""


class GatheredLayers(WholeLayers):
    """The units of a model (``hvdlm.parallel.layer_units``), of which this rank holds ``shard``.

    The head computes its backward pass right after its forward pass, and the last layer after that: both stay in
    between. The embedding's backward pass reads no parameter.

    Attributes:
        parameters: by name; they have values while their unit is gathered.
        tied: the table of the head where it is the embedding's: a leaf of its own, so that each of its two gradients is
            scattered as soon as it is there.
        held: the bytes of gathered parameters, and of those on their way; and of gradients, which others count.
        addresses: where gathered parameters are in memory.
        before_pass: called before every forward pass.
    """

    def __init__(self, state: ShardedState, shard: torch.Tensor) -> None:
        self.parameters: dict[str, torch.nn.Parameter] = {}
        self.tied: torch.nn.Parameter | None = None
        self.held = HeldBytes("parameters", "gradients")
        self.addresses: set[int] = set()
        self.before_pass: Callable[[], None] = lambda: None
        self._units: dict[str, _GatheredUnit] = {}
        for unit in units_of(state.layout):
            kind = _GatheredOnce if unit.name in (EMBEDDING, HEAD) else _GatheredTwice
            self._units[unit.name] = made = kind(state, unit, shard, self.held, self.addresses)
            self.parameters |= made.parameters
        self._order = list(self._units)
        self._phases = {name: [unit] for name, unit in self._units.items()}
        if state.spec.settings.tie_embeddings:
            embedding = self._units[EMBEDDING]
            assert isinstance(embedding, _GatheredOnce)
            self.tied = embedding.make_alias("embed.tokens")
            self._phases[HEAD].append(embedding)

    def enter(self, x: Any, name: str) -> Any:
        """Wait until unit ``name`` is gathered; return its input ``x``, whose gradient is the end of its backward pass.

        ``x``: None or tokens, whose unit is the first one.
        """
        if name == self._order[0]:
            self.before_pass()
            for unit in self._units.values():  # an evaluation's head; the parameters may have changed since
                unit.free()
        if not isinstance(x, torch.Tensor):
            self.gather(name, 1)
            return x
        return _Enter.apply(x, self, name)

    def leave(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Free unit ``name``; return its output ``x``, whose gradient is the start of its backward pass."""
        if name == EMBEDDING or not (torch.is_grad_enabled() and x.requires_grad):
            self.free(name)
            return x
        return _Leave.apply(x, self, name, name == self._order[-2])

    def gather(self, name: str, direction: int) -> None:
        """Wait for the parameters of unit ``name``, and start to gather the next one: 1 forward, -1 backward."""
        for unit in self._phases[name]:
            unit.gather()
        following = self._order.index(name) + direction
        if following < len(self._order) and self._order[following] != EMBEDDING:
            for unit in self._phases[self._order[following]]:
                unit.start()

    def free(self, name: str) -> None:
        """Free the parameters of unit ``name``."""
        for unit in self._phases[name]:
            unit.free()

    def release(self, leaf: torch.Tensor) -> None:
        """Free the table of the head, whose gradient has been computed: room for the sum of gradients."""
        for unit in self._phases[HEAD]:
            unit.release(leaf)


class _Enter(torch.autograd.Function):
    """The start of a unit's forward pass, and the end of its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layers: GatheredLayers, name: str) -> torch.Tensor:
        ctx.layers, ctx.name = layers, name
        layers.gather(name, 1)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        ctx.layers.free(ctx.name)
        return gradient, None, None


class _Leave(torch.autograd.Function):
    """The end of a unit's forward pass, after which it perhaps ``stays``, and the start of its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layers: GatheredLayers, name: str, stays: bool) -> torch.Tensor:
        ctx.layers, ctx.name = layers, name
        if not stays:
            layers.free(name)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        ctx.layers.gather(ctx.name, -1)
        return gradient, None, None, None


class _GatheredUnit:
    """A unit's parameters, and its range of the rank's ``shard``."""

    def __init__(
        self, state: ShardedState, unit: Unit, shard: torch.Tensor, held: HeldBytes, addresses: set[int]
    ) -> None:
        self._exchange: Any = state.exchange
        self._ranks = state.exchange.traits.zero_size
        self._held = held
        self._addresses = addresses
        self._shard = shard
        self._size = unit.size
        self._start_of_unit = unit.elements[0]
        self._buckets = range(*unit.buckets)
        self._shards = [state.shard_ranges[index] for index in self._buckets]  # in ``shard``
        self._ranges = [tuple(end - unit.elements[0] for end in state.layout.bucket_range(i)) for i in self._buckets]
        first, last = state.layout.buckets[self._buckets[0]][0], state.layout.buckets[self._buckets[-1]][1]
        self._slots = {slot.name: slot for slot in state.layout.slots[first:last]}
        self._handles: list[Handle] = []
        self._gathered = False
        self._released = 0  # bytes of buckets that are freed before the rest
        self.parameters: dict[str, torch.nn.Parameter] = {}

    def start(self) -> None:
        """Start to gather, unless that is done or under way."""
        if not (self._gathered or self._handles):
            self._held.take("parameters", 4 * self._size)
            self._handles = self._start()

    def gather(self) -> None:
        """Wait until the parameters have their values."""
        if not self._gathered:
            self.start()
            self._fill([handle.wait() for handle in self._handles])
            self._handles, self._gathered = [], True

    def free(self) -> None:
        """Free the memory of the parameters."""
        if self._gathered:
            self._empty()
            self._gathered = False
            self._held.free("parameters", 4 * self._size - self._released)
            self._released = 0

    def release(self, leaf: torch.Tensor) -> None:
        """Free the bucket of ``leaf`` already, if it has one of its own."""

    def _start(self) -> list[Handle]:
        raise NotImplementedError

    def _fill(self, results: Sequence[torch.Tensor]) -> None:
        raise NotImplementedError

    def _empty(self) -> None:
        raise NotImplementedError

    def _view(self, vector: torch.Tensor, slot: Slot) -> torch.Tensor:
        """Return a slot's elements of a vector of the unit's."""
        return vector[slot.start - self._start_of_unit : slot.stop - self._start_of_unit].view(slot.shape)


class _GatheredTwice(_GatheredUnit):
    """A layer, gathered for its forward pass and for its backward pass, by one collective each."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        whole = torch.empty(self._size, device=self._shard.device)
        self.parameters = {name: torch.nn.Parameter(self._view(whole, slot)) for name, slot in self._slots.items()}
        # Another tensor with a version of its own: the values that autograd has kept views of are the same again.
        self._values = whole.data
        self._storage = whole.untyped_storage()
        self._storage.resize_(0)

    def _start(self) -> list[Handle]:
        shard = self._shard[self._shards[0][0] : self._shards[-1][1]]
        return [self._exchange.gather_vector(shard, self._buckets[0], "parameters")]

    def _fill(self, results: Sequence[torch.Tensor]) -> None:
        """Copy the ranks' shards of every bucket, which lie one rank after the other, behind each other."""
        (gathered,) = results
        self._storage.resize_(4 * self._size)
        self._held.take("parameters", 4 * self._size)
        by_rank, first = gathered.view(self._ranks, -1), self._shards[0][0]
        for (start, stop), (low, high) in zip(self._ranges, self._shards, strict=True):
            self._values[start:stop].view(self._ranks, -1).copy_(by_rank[:, low - first : high - first])
        self._held.free("parameters", 4 * self._size)  # the result's
        self._addresses.add(self._storage.data_ptr())

    def _empty(self) -> None:
        self._addresses.discard(self._storage.data_ptr())
        self._storage.resize_(0)


class _Bound(NamedTuple):
    """A parameter, its first element in its bucket, and what it is bound to while it has no values."""

    parameter: torch.nn.Parameter
    first: int
    empty: torch.Tensor


class _GatheredOnce(_GatheredUnit):
    """The embedding or the head, gathered where it is used: its parameters are what the collectives return."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._bound: dict[int, list[_Bound]] = {index: [] for index in self._buckets}
        for name in self._slots:
            self.parameters[name] = self.make_alias(name)

    def make_alias(self, name: str) -> torch.nn.Parameter:
        """Return another leaf with the values of parameter ``name``."""
        slot = self._slots[name]
        empty = torch.empty(slot.shape, device=self._shard.device)
        empty.untyped_storage().resize_(0)
        parameter = torch.nn.Parameter(empty.data)
        for index, (start, stop) in zip(self._buckets, self._ranges, strict=True):
            first = slot.start - self._start_of_unit - start
            if 0 <= first < stop - start:
                self._bound[index].append(_Bound(parameter, first, empty))
        return parameter

    def release(self, leaf: torch.Tensor) -> None:
        """Free the bucket of ``leaf`` already, if it has one of its own."""
        for index, (start, stop) in zip(self._buckets, self._ranges, strict=True):
            bound = self._bound[index]
            alone = all(first == 0 for _, first, _ in bound)
            if self._gathered and alone and any(parameter is leaf for parameter, _, _ in bound):
                self._drop(bound)
                self._released += 4 * (stop - start)
                self._held.free("parameters", 4 * (stop - start))

    def _start(self) -> list[Handle]:
        shards = zip(self._buckets, self._shards, strict=True)
        return [self._exchange.gather_vector(self._shard[low:high], i, "parameters") for i, (low, high) in shards]

    def _fill(self, results: Sequence[torch.Tensor]) -> None:
        for bound, result in zip(self._bound.values(), results, strict=True):
            for parameter, first, empty in bound:
                parameter.data = result[first : first + empty.numel()].view(empty.shape)
                self._addresses.add(parameter.untyped_storage().data_ptr())

    def _empty(self) -> None:
        for bound in self._bound.values():
            self._drop(bound)

    def _drop(self, bound: Sequence[_Bound]) -> None:
        for parameter, _, empty in bound:
            self._addresses.discard(parameter.untyped_storage().data_ptr())
            parameter.data = empty
