"""Storage of gradients, and their sums over ranks, which overlap with the backward pass.

The layout cuts the flat gradient into buckets, in the order in which the backward pass finishes them. A hook on every
parameter counts what is missing in its bucket; the last one starts the bucket's collective.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from hvdlm.parallel.flat_layout import FlatLayout
from hvdlm.parallel.layer_units import units_of
from hvdlm.parallel.sharded_state import ShardedState
from hvdlm.protocols.group import Handle
from hvdlm_language.axis_groups import Axes
from hvdlm_language.leaf_tree import LeafTree
from hvdlm_torch.gathered_layers import GatheredLayers

Parameters = Mapping[str, torch.nn.Parameter]


class Sums(NamedTuple):
    """The metrics of a step, summed over the ranks.

    Attributes:
        totals: the loss sum, the valid tokens and the gradient's squared norm of the global batch, float64 ``[3]``.
        gradient_seconds: the time waited for gradients.
        stage_seconds: the time waited for other pipeline stages.
    """

    totals: torch.Tensor
    gradient_seconds: float
    stage_seconds: float


class Gradients(ABC):
    """The gradients of one step.

    Attributes:
        shard: the summed gradients that this rank applies: ``[size / ranks]`` with ZeRO, else all, ``[size]``.
    """

    shard: torch.Tensor

    def __init__(self, state: ShardedState, axes: Axes) -> None:
        self._state = state
        self._axes = axes
        self._layout = state.layout
        self._exchange = state.exchange
        self._ranges = [self._layout.bucket_range(index) for index in range(len(self._layout.buckets))]
        self._handles: dict[int, Handle] = {}
        self._missing: list[int] | None = None  # per bucket, the gradients that the backward pass still owes
        self._counts = True  # whether the present backward pass pays them
        self._starts = len(self._ranges)  # the collectives of a backward pass
        self._next = self._starts  # the first bucket that has not been started

    @abstractmethod
    def begin(self) -> None:
        """Clear the gradients of the step before."""

    @abstractmethod
    def before_backward(self, last: bool) -> None:
        """Prepare for the backward pass of a micro-batch, perhaps the ``last`` of the step, or of a virtual stage."""

    @abstractmethod
    def bytes(self) -> int:
        """Return the bytes held for gradients."""

    def row(self, number: int) -> int | None:
        """Return the row of the global batch by which micro-batch ``number`` seeds dropout; None: the rank's seed."""
        return None

    @abstractmethod
    def _start(self, index: int) -> None:
        """Start the collective of a bucket."""

    def _expect_all(self) -> None:
        """Have buckets started as they fill in the backward pass that follows."""
        self._missing, self._next = [stop - first for first, stop in self._layout.buckets], 0

    @torch.no_grad()
    def _arrived(self, index: int) -> None:
        if self._missing is None or not self._counts:
            return
        self._missing[index] -= 1
        # In their order, since all ranks have to call alike: a compiled backward pass finishes them in another one.
        while self._next < self._starts and not self._missing[self._next]:
            self._start(self._next)
            self._next += 1

    @torch.no_grad()
    def _start_rest(self) -> None:
        """Start the buckets with a parameter that the batch didn't reach, which has called no hook."""
        self._missing = None
        for index in range(self._next, self._starts):
            self._start(index)
        self._next = self._starts

    def reduce(self, losses: Sequence[torch.Tensor], tokens: float) -> Sums:
        """Sum ``shard``, the micro-batches' sums of ``losses`` (float64) and valid ``tokens`` over the ranks."""
        totals = self._metrics(losses, tokens)
        # Not right after the forward pass: Horovod's thread would take a core from the backward pass.
        metrics = self._exchange.start_metrics(totals) if self._exchange.traits.zero_size == 1 else None
        gradient_seconds = self._wait()
        began = time.perf_counter()
        self._add_tied()
        stage_seconds = time.perf_counter() - began
        squared = self._squared_norm()
        if metrics is None:  # ZeRO: a rank has the norm of its shard only, which is summed with the metrics
            metrics = self._exchange.start_metrics(torch.cat([totals, squared]))
            squared = squared.new_zeros(0)
        totals = torch.cat([metrics.wait(), squared])
        began = time.perf_counter()
        values = self._sum_over_model(totals)
        return Sums(values, gradient_seconds, stage_seconds + (time.perf_counter() - began))

    def _metrics(self, losses: Sequence[torch.Tensor], tokens: float) -> torch.Tensor:
        """Return what is summed over the ranks, the loss sum and the tokens: float64 ``[2]``."""
        totals = torch.zeros(2, dtype=torch.float64, device=self.shard.device)
        for loss in losses:
            totals[0] += loss
        totals[1] = tokens
        return totals

    @abstractmethod
    def _wait(self) -> float:
        """Wait until ``shard`` is summed over the data ranks; return the seconds that this took."""

    def _add_tied(self) -> None:
        """Add up the gradients of the parameters that the first and the last pipeline stage both hold."""
        ends = self._axes.ends
        if ends is None:
            return
        for index in self._state.tied_buckets:
            gradient = self.shard[slice(*self._state.shard_ranges[index])]
            total = ends.all_reduce_async(gradient, "tied").wait()
            if total.data_ptr() != gradient.data_ptr():
                gradient.copy_(total)

    @torch.no_grad()
    def _squared_norm(self) -> torch.Tensor:
        """Return the sum of the shard's squares, float64 ``[1]``.

        A gradient that several tensor ranks or stages hold counts on one of them, so that the ranks' sums add up.
        """
        norms = [norm for start, stop in self._state.norm_ranges for norm in _row_norms(self.shard[start:stop])]
        if not norms:
            return self.shard.new_zeros(1).double()
        return torch.cat(norms).double().square().sum(0, keepdim=True)

    def _sum_over_model(self, totals: torch.Tensor) -> torch.Tensor:
        """Return (loss sum, tokens, squared norm) of the whole model from this rank's, float64 ``[3]``."""
        if len(self._axes.model.ranks) > 1:
            model_shard = self._state.model_shard
            if not (model_shard.stage.last and model_shard.index == 0):
                totals[:2] = 0.0  # all tensor ranks of the last stage know the losses: one of them counts
            totals = self._axes.model.all_reduce_async(totals, "norm").wait()
        return totals


class WholeGradients(Gradients):
    """All gradients in one flat vector ``[size]``: every parameter's ``grad`` is a view of it, a bucket a range."""

    def __init__(
        self, state: ShardedState, axes: Axes, parameters: Parameters, leaves: Parameters, device: torch.device
    ) -> None:
        super().__init__(state, axes)
        layout, ranks = self._layout, self._exchange.traits.zero_size
        self._flat = torch.zeros(layout.size, device=device)
        self.shard = self._flat if ranks == 1 else torch.zeros(layout.size // ranks, device=device)
        for slot in layout.slots:
            parameters[slot.name].grad = self._flat[slot.start : slot.stop].view(slot.shape)
        if self._exchange.traits.size > 1:
            _register_hooks(layout, leaves, self._arrived)

    def begin(self) -> None:
        """Set all gradients to zero: micro-batches add to them."""
        self._flat.zero_()
        self._missing = None

    def before_backward(self, last: bool) -> None:
        """Have buckets sent as they fill in the ``last`` backward pass, after which nothing is added to them.

        Virtual stages have one each, between which others follow that complete nothing.
        """
        if last and self._missing is None:
            self._expect_all()
        self._counts = last

    def _start(self, index: int) -> None:
        start, stop = self._ranges[index]
        self._handles[index] = self._exchange.start(self._flat[start:stop], index)

    def _wait(self) -> float:
        """Start the buckets that no hook has started, and wait for all; return the seconds that this took."""
        began = time.perf_counter()
        self._start_rest()
        for index, (start, stop) in enumerate(self._state.shard_ranges):
            reduced, target = self._handles.pop(index).wait(), self.shard[start:stop]
            if reduced.data_ptr() != target.data_ptr():  # an all-reduce in place has left its sum where it belongs
                target.copy_(reduced[: stop - start])
        return time.perf_counter() - began

    def bytes(self) -> int:
        """Return the bytes held for gradients."""
        return 4 * (len(self._flat) + (len(self.shard) if self.shard is not self._flat else 0))


class TreeGradients(WholeGradients):
    """The gradients of micro-batches that are leaves, added in the order of a ``LeafTree`` (exact sums).

    The flat vector holds the newest sum of the tree's stack, to which autograd itself adds the next leaf where the two
    are joined. Otherwise it is copied to the sums that wait, and the next leaf starts from zero.
    """

    def __init__(
        self, state: ShardedState, axes: Axes, parameters: Parameters, leaves: Parameters, device: torch.device
    ) -> None:
        super().__init__(state, axes, parameters, leaves, device)
        self._tree = LeafTree.of(state.config, state.mesh.data, state.coordinates["data"])
        self._rows = state.config.train.batch_size // self._tree.leaves
        self._stack = [torch.zeros_like(self._flat) for _ in range(self._tree.depth)]
        self._waiting = 0  # sums in the stack
        self._leaf = -1  # the one that was computed last

    def begin(self) -> None:
        """Empty the stack."""
        super().begin()
        self._waiting, self._leaf = 0, -1

    @torch.no_grad()
    def before_backward(self, last: bool) -> None:
        """Join the leaf before with the sums that wait for it, and make room where the next one isn't added to it."""
        if self._leaf >= 0:
            for _ in range(self._tree.joins[self._leaf] - 1):  # autograd has done the first
                self._waiting -= 1
                self._flat += self._stack[self._waiting]
        self._leaf += 1
        if self._leaf and not self._tree.joins[self._leaf]:
            self._stack[self._waiting].copy_(self._flat)
            self._waiting += 1
            self._flat.zero_()
        super().before_backward(last)

    def _start(self, index: int) -> None:
        start, stop = self._ranges[index]
        newest, waiting = self._flat[start:stop], [s[start:stop] for s in self._stack[: self._waiting]]
        for _ in range(self._tree.joins[self._leaf] - 1):
            newest += waiting.pop()
        self._handles[index] = self._exchange.start(self._packed([*waiting, newest]), index)

    def _packed(self, roots: list[torch.Tensor]) -> torch.Tensor:
        """Return this rank's roots ``[elements]`` as ``[ranks, roots, elements / ranks]``, flat and padded by zeros."""
        ranks, missing = self._exchange.traits.size, self._tree.roots - len(roots)
        padding = -len(roots[0]) % ranks
        if self._tree.roots == 1 and not padding:
            return roots[0]
        rows = F.pad(torch.stack(roots), (0, padding, 0, missing))
        return rows.view(self._tree.roots, ranks, -1).transpose(0, 1).flatten()

    def _metrics(self, losses: Sequence[torch.Tensor], tokens: float) -> torch.Tensor:
        """Return every leaf's loss sum, and all tokens in the first row: float64 ``[leaves, 2]``."""
        sums = torch.stack(list(losses))
        counts = torch.zeros_like(sums)
        counts[0] = tokens
        return torch.stack([sums, counts], 1)

    def row(self, number: int) -> int:
        """Return the first row of a leaf, which is the same on any number of ranks."""
        return (self._tree.first + number) * self._rows

    def bytes(self) -> int:
        """Return the bytes held for gradients, with the sums that wait."""
        return super().bytes() + 4 * len(self._flat) * len(self._stack)


class ScatteredGradients(Gradients):
    """Of all gradients this rank's shard only (ZeRO-2): a full bucket is reduce-scattered and its memory freed."""

    def __init__(
        self, state: ShardedState, axes: Axes, parameters: Parameters, leaves: Parameters, device: torch.device
    ) -> None:
        super().__init__(state, axes)
        self._parameters = parameters
        self.shard = torch.zeros(self._layout.size // self._exchange.traits.zero_size, device=device)
        self._waited = 0.0
        self._in_flight: dict[int, int] = {}  # elements of the buckets under way
        self._most_in_flight = 0
        _register_hooks(self._layout, leaves, self._arrived)

    def begin(self) -> None:
        """Set the shard to zero: micro-batches add to it."""
        self.shard.zero_()
        self._waited = 0.0

    def before_backward(self, last: bool) -> None:
        """Add what the micro-batch before has scattered; every micro-batch scatters its own gradients."""
        self._start_rest()
        self._finish_all()
        self._expect_all()

    def _start(self, index: int) -> None:
        # One bucket travels while the next one fills; older ones are finished first, to bound the memory.
        for earlier in list(self._handles)[:-1]:
            self._finish(earlier)
        start, stop = self._ranges[index]
        bucket = self.shard.new_zeros(stop - start)
        first, last = self._layout.buckets[index]
        for slot in self._layout.slots[first:last]:
            parameter = self._parameters[slot.name]
            if parameter.grad is not None:
                bucket[slot.start - start : slot.stop - start] = parameter.grad.flatten()
                parameter.grad = None
        self._in_flight[index] = len(bucket)
        self._most_in_flight = max(self._most_in_flight, sum(self._in_flight.values()))
        self._handles[index] = self._exchange.start(bucket, index)

    def _finish(self, index: int) -> None:
        """Wait for a bucket under way, and add this rank's shard of its sum."""
        began = time.perf_counter()
        reduced = self._handles.pop(index).wait()
        start, stop = self._state.shard_ranges[index]
        self.shard[start:stop] += reduced
        del self._in_flight[index]
        self._waited += time.perf_counter() - began

    def _finish_all(self) -> None:
        for index in list(self._handles):
            self._finish(index)

    @torch.no_grad()
    def _wait(self) -> float:
        """Wait for all buckets; return the seconds waited in this step, during backward passes too."""
        self._start_rest()
        self._finish_all()
        return self._waited

    def bytes(self) -> int:
        """Return the bytes held for gradients, with the most that were under way at once."""
        return 4 * (len(self.shard) + self._most_in_flight)


class LayerGradients(ScatteredGradients):
    """This rank's shard of gradients whose memory is bounded by one layer's (ZeRO-3).

    A matrix is scattered from the memory in which autograd has left its gradient, a layer's few other parameters
    together. Before the next gradient is computed, as many of those under way are finished as leave room for it.

    The table of a tied embedding has two gradients, that of the head and that of the embedding, which are scattered one
    by one.
    """

    def __init__(
        self,
        state: ShardedState,
        axes: Axes,
        parameters: Parameters,
        layers: GatheredLayers,
        device: torch.device,
    ) -> None:
        Gradients.__init__(self, state, axes)
        self._layers = layers
        self._held = layers.held
        layers.before_pass = self._settle
        ranks, layout = self._exchange.traits.zero_size, self._layout
        self.shard = torch.zeros(layout.size // ranks, device=device)
        self._waited = 0.0
        # In the order of the backward pass: a bucket, and its slots with their leaves.
        self._events = [
            (index, [(slot, parameters[slot.name]) for slot in layout.slots[first:last]])
            for index, (first, last) in enumerate(layout.buckets)
        ]
        if layers.tied is not None:
            index, slots = next(event for event in self._events if event[1][0][0].name == "embed.tokens")
            self._events.insert(0, (index, [(slots[0][0], layers.tied)]))
        self._starts = self._next = len(self._events)
        self._bytes = [4 * (stop - start) for start, stop in (self._ranges[index] for index, _ in self._events)]
        self._most = 4 * max(unit.size for unit in units_of(layout))
        for number, (_, slots) in enumerate(self._events):
            for _, leaf in slots:
                leaf.register_post_accumulate_grad_hook(partial(self._count, number))

    def _expect_all(self) -> None:
        self._missing, self._next = [len(slots) for _, slots in self._events], 0

    def _settle(self) -> None:
        """Finish what the backward pass before has left under way."""
        if self._missing is not None:
            self._start_rest()
            self._finish_all()

    def _count(self, number: int, leaf: torch.Tensor) -> None:
        self._held.take("gradients", 4 * leaf.numel())
        self._layers.release(leaf)
        self._arrived(number)

    def _start(self, number: int) -> None:
        index, slots = self._events[number]
        start, stop = self._ranges[index]
        alike = [other for other in self._handles if self._events[other][0] == index]
        for other in alike:  # the tied table's other gradient, whose collective has the same name
            self._finish(other)
        slot, leaf = slots[0]
        if len(slots) == 1 and leaf.grad is not None and slot.stop - slot.start == stop - start:
            bucket, leaf.grad = leaf.grad.view(-1), None
        else:
            bucket = self.shard.new_zeros(stop - start)
            self._held.take("gradients", self._bytes[number])
            for slot, leaf in slots:
                if leaf.grad is not None:
                    bucket[slot.start - start : slot.stop - start] = leaf.grad.view(-1)
                    leaf.grad = None
                    self._held.free("gradients", 4 * leaf.numel())
        self._held.take("gradients", self._bytes[number] // self._exchange.traits.zero_size)  # the collective's result
        self._handles[number] = self._exchange.start(bucket, index)
        following = self._bytes[number + 1] if number + 1 < self._starts else 0
        while self._handles and self._held.of("gradients") + following > self._most:
            self._finish(next(iter(self._handles)))

    def _finish(self, number: int) -> None:
        began = time.perf_counter()
        start, stop = self._state.shard_ranges[self._events[number][0]]
        self.shard[start:stop] += self._handles.pop(number).wait()
        self._held.free("gradients", self._bytes[number] + 4 * (stop - start))
        self._waited += time.perf_counter() - began

    def bytes(self) -> int:
        """Return the bytes held for gradients, with the most that were computed or under way at once."""
        return 4 * len(self.shard) + self._held.at_peak["gradients"]


def make_gradients(
    state: ShardedState,
    axes: Axes,
    parameters: Parameters,
    leaves: Parameters,
    device: torch.device,
    layers: GatheredLayers | None = None,
) -> Gradients:
    """Return the gradients in the form that the exchange asks for; ``layers``: those of ZeRO-3.

    ``leaves``: of every parameter, the tensor whose gradient the backward pass computes. Where that is another tensor
    (LoRA), the hook that derives the parameter's gradient has to be registered on it before.
    """
    if state.config.communication.reduction == "exact":
        return TreeGradients(state, axes, parameters, leaves, device)
    if layers is not None:
        return LayerGradients(state, axes, parameters, layers, device)
    kind = ScatteredGradients if state.exchange.traits.scatters_every else WholeGradients
    return kind(state, axes, parameters, leaves, device)


def _register_hooks(layout: FlatLayout, leaves: Parameters, arrived: Callable[[int], None]) -> None:
    """Have ``arrived(bucket)`` called whenever the gradient of a parameter of that bucket has been computed."""
    for index, (first, last) in enumerate(layout.buckets):

        def hook(_: torch.Tensor, index: int = index) -> None:
            arrived(index)

        for slot in layout.slots[first:last]:
            leaves[slot.name].register_post_accumulate_grad_hook(hook)


def _row_norms(flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the norms of a vector's rows of 1024 elements, and of what is left over.

    torch adds up a long vector on a CPU in a few running sums of its own precision: the norm of 30 M normal numbers
    came out 6e-4 too small, of these rows 2e-10, in the same time.
    """
    whole = len(flat) - len(flat) % 1024
    rest = torch.linalg.vector_norm(flat[whole:]).reshape(1)
    return torch.linalg.vector_norm(flat[:whole].view(-1, 1024), dim=1), rest
