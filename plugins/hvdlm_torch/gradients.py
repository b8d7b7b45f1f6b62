"""Where gradients lie, and how they travel while the backward pass goes on."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from hvdlm.parallel.flat_layout import FlatLayout
from hvdlm.protocols.exchange import Exchange
from hvdlm.protocols.group import Handle

Parameters = Mapping[str, torch.nn.Parameter]


class WholeGradients:
    """All gradients in one flat vector ``[size]``, which parameters' ``grad`` are views of; a bucket is a range of it.

    Attributes:
        own: the gradients that this rank applies, ``[size / parts]``: all of them where ranks share no optimizer.
    """

    def __init__(
        self, layout: FlatLayout, parameters: Parameters, leaves: Parameters, exchange: Exchange, device: torch.device
    ) -> None:
        self._layout, self._exchange = layout, exchange
        self._flat = torch.zeros(layout.size, device=device)
        self.own = (
            self._flat if exchange.zero_size == 1 else torch.zeros(layout.size // exchange.zero_size, device=device)
        )
        self._ranges = [layout.bucket_range(i) for i in range(len(layout.buckets))]
        self._handles: dict[int, Handle] = {}
        self._missing: list[int] | None = None
        for slot in layout.slots:
            parameters[slot.name].grad = self._flat[slot.start : slot.stop].view(slot.shape)
        if exchange.size > 1:
            _tell(layout, leaves, self._arrived)

    def begin(self) -> None:
        """Begin a step."""
        self._flat.zero_()

    def micro_batch(self, last: bool) -> None:
        """Hear that the backward pass of a micro-batch begins: in the ``last``, buckets travel as they fill."""
        if last:
            self._missing = [stop - first for first, stop in self._layout.buckets]

    def _arrived(self, index: int) -> None:
        if self._missing is None:
            return
        self._missing[index] -= 1
        if self._missing[index] == 0:
            self._start(index)

    def _start(self, index: int) -> None:
        start, stop = self._ranges[index]
        self._handles[index] = self._exchange.start(self._flat[start:stop], index)

    def wait(self) -> float:
        """Start what has not started, wait for all buckets; return the seconds that this took."""
        self._missing = None
        started, place = time.perf_counter(), 0
        for index in range(len(self._ranges)):
            if index not in self._handles:
                self._start(index)
        for index in range(len(self._ranges)):
            reduced = self._handles.pop(index).wait()
            target = self.own[place : place + len(reduced)]
            if reduced.data_ptr() != target.data_ptr():
                target.copy_(reduced)
            place += len(reduced)
        return time.perf_counter() - started

    def bytes(self) -> int:
        """Return the bytes held for gradients."""
        return 4 * (len(self._flat) + (len(self.own) if self.own is not self._flat else 0))


class ScatteredGradients:
    """Of all gradients this rank's parts only (ZeRO-2): a bucket is scattered, and forgotten, once it is full."""

    def __init__(
        self, layout: FlatLayout, parameters: Parameters, leaves: Parameters, exchange: Exchange, device: torch.device
    ) -> None:
        self._layout, self._parameters, self._exchange = layout, parameters, exchange
        self.own = torch.zeros(layout.size // exchange.zero_size, device=device)
        starts = layout.zero_ranges(exchange.zero_rank, exchange.zero_size)
        lengths = [stop - start for start, stop in starts]
        self._places = [sum(lengths[:i]) for i in range(len(lengths))]
        self._handles: dict[int, Handle] = {}
        self._missing = [0] * len(layout.buckets)
        self._waited = 0.0
        self._flying: dict[int, int] = {}
        self._most = 0
        _tell(layout, leaves, self._arrived)

    def begin(self) -> None:
        """Begin a step."""
        self.own.zero_()
        self._waited = 0.0

    def micro_batch(self, last: bool) -> None:
        """Hear that the backward pass of a micro-batch begins: what the one before scattered is added up."""
        self._land_all()
        self._missing = [stop - first for first, stop in self._layout.buckets]

    @torch.no_grad()
    def _arrived(self, index: int) -> None:
        self._missing[index] -= 1
        if self._missing[index] == 0:
            self._start(index)

    def _start(self, index: int) -> None:
        for earlier in list(self._handles)[:-1]:  # one travels while the next one fills: no more are kept
            self._land(earlier)
        start, stop = self._layout.bucket_range(index)
        bucket = self.own.new_zeros(stop - start)
        first, last = self._layout.buckets[index]
        for slot in self._layout.slots[first:last]:
            parameter = self._parameters[slot.name]
            if parameter.grad is not None:
                bucket[slot.start - start : slot.stop - start] = parameter.grad.flatten()
                parameter.grad = None
        self._flying[index] = len(bucket)
        self._most = max(self._most, sum(self._flying.values()))
        self._handles[index] = self._exchange.start(bucket, index)

    def _land(self, index: int) -> None:
        """Wait for a bucket that is under way, and add this rank's part of it."""
        started = time.perf_counter()
        part = self._handles.pop(index).wait()
        self.own[self._places[index] : self._places[index] + len(part)] += part
        del self._flying[index]
        self._waited += time.perf_counter() - started

    def _land_all(self) -> None:
        for index in list(self._handles):
            self._land(index)

    @torch.no_grad()
    def wait(self) -> float:
        """Wait for all buckets; return the seconds that this and earlier waiting took."""
        for index, missing in enumerate(self._missing):
            if missing:
                self._start(index)
        self._land_all()
        return self._waited

    def bytes(self) -> int:
        """Return the bytes held for gradients: of buckets under way, the most that there were."""
        return 4 * (len(self.own) + self._most)


def make_gradients(
    layout: FlatLayout, parameters: Parameters, leaves: Parameters, exchange: Exchange, device: torch.device
) -> WholeGradients | ScatteredGradients:
    """Return what the exchange asks for; ``leaves``: what the backward pass reaches when a parameter has its gradient.

    Hooks of the leaves that make parameters' gradients have to be registered before.
    """
    kind = ScatteredGradients if exchange.scatters_every else WholeGradients
    return kind(layout, parameters, leaves, exchange, device)


def _tell(layout: FlatLayout, leaves: Parameters, arrived: object) -> None:
    """Have ``arrived(bucket)`` called whenever the gradient of one of a bucket's parameters is there."""
    for index, (first, last) in enumerate(layout.buckets):
        for slot in layout.slots[first:last]:
            leaves[slot.name].register_post_accumulate_grad_hook(lambda _, i=index: arrived(i))  # type: ignore
