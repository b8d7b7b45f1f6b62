"""Streaming DiLoCo: fragments of the model synchronise in turn, while the ranks continue to train."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from keras import Variable, ops

from hvdlm.communication.all_reduce import AllReduceExchange
from hvdlm.config import LocalConfig
from hvdlm.errors import HvdlmError
from hvdlm.parallel.flat_layout import FlatLayout
from hvdlm.protocols.group import Done, Group, Handle
from hvdlm.protocols.types import Tensor
from hvdlm_compression.compressor import Compressor, call_directly
from hvdlm_compression.fragments import cut_into_fragments
from hvdlm_compression.gathered_sums import GatheredSum, GatheredSums
from hvdlm_compression.local import outer_step

OVERLAP = 2
"""Default of ``communication.local.overlap``: steps in which a sum travels."""
MIXING = 0.0
"""Default of ``communication.local.mixing``; the paper's is 0.5.

With outer learning rate a, momentum m and r = a / (1 - m), rounds that each move the ranks by s move the global
parameters by r s / (1 + alpha (r - 1)): the ranks follow the outer optimizer's extrapolation by 1 - alpha only. The
defaults of ``diloco``, r = 3.5, are tuned without mixing (docs/compression.md).
"""


@dataclass
class Fragment:
    """Elements ``start:stop`` of the flat vector.

    Attributes:
        offset: it synchronises after the steps whose number modulo H is this.
        last: the step after which it synchronises for the last time.
        anchor: the global parameters' Variable ``[stop - start]``.
        velocity: the outer momentum's Variable; None: there is none.
        index: of its bucket.
        difference, encode, decode, update: what is computed before a sum and after it, for one graph each.
        call: calls ``encode`` and ``decode`` of the sum in flight, perhaps as graphs.
        handle: its sum in flight, or one that has arrived and is not due yet; None: there is none.
        due: number of the step after which the sum is applied.
    """

    start: int
    stop: int
    offset: int
    last: int
    anchor: Any
    velocity: Any
    index: int
    difference: Callable[..., Any] = field(init=False)
    encode: Callable[..., Any] = field(init=False)
    decode: Callable[..., Any] = field(init=False)
    update: Callable[..., Any] = field(init=False)
    call: Callable[..., Any] = call_directly
    handle: Handle | None = None
    due: int = 0

    @property
    def span(self) -> str:
        """Its elements as text."""
        return f"{self.start}-{self.stop}"


class StreamingExchange(AllReduceExchange):
    """Every fragment synchronises once in H steps, at an offset of its own (Douillard et al. 2025, algorithm 2).

    After step t, d = theta_global - theta_rank of the fragment is started to be summed; after step t + ``overlap`` the
    outer optimizer applies the mean of d as ``LocalExchange`` does, and every rank continues from theta_rank = alpha
    theta_rank + (1 - alpha) theta_global, alpha = ``mixing``. The global parameters are the same on all ranks at every
    step, those of the ranks never. The differences are summed by the exchange ``inner``, which may compress them.

    The last round is short, that the global parameters contain the last steps but a few: in the last quarter of H
    steps every fragment synchronises once more, so that all sums have arrived after step ``last``.

    A collective stays in flight over several steps, so that ``advance`` is called outside of graphs.
    """

    agreed = True

    def __init__(
        self, group: Group, inner: AllReduceExchange, settings: LocalConfig, rate: float, momentum: float, last: int
    ) -> None:
        super().__init__(group)
        self._inner = inner
        self._every = settings.steps
        self._warmup = settings.warmup
        self._count = settings.fragments or max(1, settings.steps // 2)
        self._overlap = OVERLAP if settings.overlap is None else settings.overlap
        self._mixing = MIXING if settings.mixing is None else settings.mixing
        self._rate = rate
        self._momentum = momentum
        self._short_round = max(1, self._every // 4 - self._overlap)  # steps that start sums of the last round
        self._last_start = last - self._overlap
        self._step = 0
        self._sums_gradients = False
        self._owes_advance = False
        self._has_anchors = True
        self._fragments: list[Fragment] = []
        replicated = ("outer_momentum/", "in_flight/", *inner.traits.replicated)
        self.traits = replace(self.traits, replicas_diverge=True, replicated=replicated)

    def open(self, layout: FlatLayout, parameters: np.ndarray) -> None:
        """Begin all rounds from the global ``parameters``; reset the outer momentum, drop what is in flight."""
        for fragment in self._in_flight():
            self._total(fragment)  # its name is free only then
        self._layout = layout
        cut, numbers = cut_into_fragments(layout, self._count)
        self._inner.open(cut, parameters)
        if not self._fragments:
            for index, number in enumerate(numbers):
                start, stop = cut.bucket_range(index)
                zeros = np.zeros(stop - start, np.float32)
                velocity = Variable(zeros, trainable=False) if self._momentum else None
                offset = number * self._every // self._count
                last = self._last_start - number * self._short_round // self._count
                anchor = Variable(zeros, trainable=False)
                fragment = Fragment(start, stop, offset, last, anchor, velocity, index)
                for name in ("difference", "encode", "decode", "update"):
                    setattr(fragment, name, partial(getattr(self, f"_{name}"), fragment))
                self._fragments.append(fragment)
        for fragment in self._fragments:
            fragment.anchor.assign(parameters[fragment.start : fragment.stop])
            if fragment.velocity is not None:
                fragment.velocity.assign(np.zeros(fragment.stop - fragment.start, np.float32))
        self._owes_advance, self._has_anchors = False, True

    def _in_flight(self) -> list[Any]:
        return [fragment for fragment in self._fragments if fragment.handle is not None]

    def begin(self, step: int) -> Hashable:
        """Return the step's phase: ``every`` in the warm-up, else ``local``.

        Raises:
            HvdlmError: the framework didn't call ``advance`` after the step before.
        """
        if self._owes_advance and step == self._step + 1:
            raise HvdlmError(
                "communication.exchange streaming_diloco: this framework's Trainable doesn't call the exchange's "
                "advance() after a step, so that nothing would be synchronised: choose diloco, which needs no such "
                "call."
            )
        self._step, self._owes_advance = step, True
        self._sums_gradients = step < self._warmup
        self._has_anchors = self._has_anchors and not self._sums_gradients
        self.stands_for = 1 if self._sums_gradients else self.size
        return "every" if self._sums_gradients else "local"

    def start(self, bucket: Tensor, index: int) -> Handle:
        """Sum the gradient over the ranks in the warm-up; afterwards return this rank's gradient."""
        return super().start(bucket, index) if self._sums_gradients else Done(bucket)

    def start_metrics(self, values: Tensor) -> Handle:
        """Sum the metrics over the ranks in the warm-up; afterwards return this rank's metrics."""
        return super().start_metrics(values) if self._sums_gradients else Done(values)

    def advance(self, parameters: Tensor, call: Callable[..., Any] = call_directly) -> list[tuple[int, Tensor]]:
        """Apply the sums that are due after the step, and start those of the fragments whose turn it is.

        ``parameters``: this rank's flat vector ``[size]``; ``call``: see ``Streams``. Returns what replaces elements
        of the vector, as (start, values).
        """
        self._owes_advance, done = False, self._step + 1
        if self._sums_gradients:
            if done == self._warmup:
                for fragment in self._fragments:
                    fragment.anchor.assign(parameters[fragment.start : fragment.stop])
                self._has_anchors = True
            return []
        replaced = [self._apply(f, parameters, call) for f in self._in_flight() if f.due <= done]
        for fragment in self._fragments:
            if self._starts(fragment, done):
                fragment.handle, fragment.due = self._start(fragment, parameters, call), done + self._overlap
                if not self._overlap:
                    replaced.append(self._apply(fragment, parameters, call))
        return replaced

    def _starts(self, fragment: Fragment, done: int) -> bool:
        """Return whether the sum of a fragment is started after step ``done``."""
        if done > self._last_start - self._short_round:
            return done == fragment.last and fragment.handle is None
        return done % self._every == fragment.offset

    def _start(self, fragment: Fragment, parameters: Tensor, call: Callable[..., Any]) -> Handle:
        """Start the sum of a fragment."""
        phase, index = self._inner.begin(self._step), fragment.index
        # Of a compressor with phases, a graph would repeat the phase in which it was traced.
        fragment.call = call if phase is None else call_directly
        if isinstance(self._inner, GatheredSums) and self._inner.encodes(index):
            row, step = fragment.call(fragment.encode, parameters)
            return self._inner.send(row, step, index)
        compressor = getattr(self._inner, "compressor", None)
        if isinstance(compressor, Compressor):
            compressor.call = fragment.call
        return self._inner.start(call(fragment.difference, parameters), index)

    def _total(self, fragment: Fragment) -> Tensor:
        """Wait for the sum of a fragment; saves and steps compute it alike, since another graph may round otherwise."""
        handle, fragment.handle = fragment.handle, None
        assert handle is not None
        if isinstance(handle, GatheredSum):
            return fragment.call(fragment.decode, handle.wait(), handle.step)
        return handle.wait()

    def _apply(self, fragment: Fragment, parameters: Tensor, call: Callable[..., Any]) -> tuple[int, Tensor]:
        """Do the outer update of a fragment; return its start and this rank's parameters of it from now on."""
        return fragment.start, call(fragment.update, self._total(fragment), parameters)

    def _difference(self, fragment: Fragment, parameters: Tensor) -> Tensor:
        """Return the global parameters minus this rank's."""
        return ops.convert_to_tensor(fragment.anchor) - parameters[fragment.start : fragment.stop]

    def _encode(self, fragment: Fragment, parameters: Tensor) -> Any:
        """Return what ``GatheredSums.encode`` makes of the difference."""
        assert isinstance(self._inner, GatheredSums)
        return self._inner.encode(self._difference(fragment, parameters), fragment.index)

    def _decode(self, fragment: Fragment, gathered: Tensor, step: Tensor) -> Tensor:
        """Return the sum of gathered rows."""
        assert isinstance(self._inner, GatheredSums)
        return self._inner.decode(gathered, step, fragment.index)

    def _update(self, fragment: Fragment, total: Tensor, parameters: Tensor) -> Tensor:
        """Do the outer update by the sum ``total``; return this rank's parameters from now on."""
        anchor = ops.convert_to_tensor(fragment.anchor)
        velocity = None if fragment.velocity is None else ops.convert_to_tensor(fragment.velocity)
        agreed, moved = outer_step(anchor, velocity, total * (1.0 / self.size), self._rate, self._momentum)
        fragment.anchor.assign(agreed)
        if fragment.velocity is not None:
            fragment.velocity.assign(moved)
        if not self._mixing:
            return agreed
        return agreed + (parameters[fragment.start : fragment.stop] - agreed) * self._mixing

    def averaged(self) -> np.ndarray | None:
        """Return the flat global parameters, float32 ``[size]``; None in the warm-up, when every rank has them."""
        return self._flat([fragment.anchor for fragment in self._fragments]) if self._has_anchors else None

    def _flat(self, variables: list[Any]) -> np.ndarray:
        """Return the values of one Variable for each fragment as a flat vector."""
        return np.concatenate([np.asarray(ops.convert_to_numpy(variable)) for variable in variables])

    def state(self) -> dict[str, np.ndarray]:
        """Return the outer momentum, the sums that are not due yet, for which it waits, and the state of ``inner``."""
        in_flight = {}
        for fragment in self._in_flight():
            total = self._total(fragment)
            fragment.handle = Done(total)
            in_flight[f"in_flight/{fragment.span}/{fragment.due}"] = np.array(ops.convert_to_numpy(total))
        state = self._inner.state() | in_flight
        if self._momentum:
            velocities = self._flat([fragment.velocity for fragment in self._fragments])
            arrays = self._layout.unflatten(velocities)
            state |= {f"outer_momentum/{name}": array for name, array in arrays.items()}
        return state

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore what ``state`` returned; a momentum that is missing starts at zero.

        Sums of other fragments, where ``fragments`` has changed, are left out: the ranks' parameters still differ from
        the global ones by what was summed, and the next sum contains it.
        """
        self._inner.load_state(state)
        by_span = {fragment.span: fragment for fragment in self._fragments}
        for name, total in state.items():
            kind, _, rest = name.partition("/")
            span, _, due = rest.partition("/")
            if kind == "in_flight" and span in by_span:
                by_span[span].handle, by_span[span].due = Done(ops.convert_to_tensor(total)), int(due)
        if self._momentum:
            zeros = self._layout.unflatten(np.zeros(self._layout.size, np.float32))
            momentum = {name: state.get(f"outer_momentum/{name}", zero) for name, zero in zeros.items()}
            flat = self._layout.flatten(momentum)
            for fragment in self._fragments:
                fragment.velocity.assign(flat[fragment.start : fragment.stop])
