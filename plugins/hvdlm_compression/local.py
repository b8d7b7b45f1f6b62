"""Infrequent synchronisation: ranks train independently and are averaged every H steps (local SGD and DiLoCo)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace

import numpy as np
from keras import Variable, ops

from hvdlm.communication.all_reduce import AllReduceExchange
from hvdlm.config import LocalConfig
from hvdlm.parallel.flat_layout import FlatLayout
from hvdlm.protocols.group import Done, Group, Handle
from hvdlm.protocols.types import Tensor


class LocalExchange(AllReduceExchange):
    """Every H steps, an outer optimizer applies the mean of the ranks' parameter differences.

    DiLoCo (Douillard et al. 2023, algorithm 1): d = mean(theta_before - theta_rank); Nesterov momentum on d:
    m = mu m + d; theta = theta_before - lr (mu m + d). With lr = 1 and mu = 0, theta is the mean of the parameters:
    local SGD (Stich 2019, algorithm 1). The differences are summed by the exchange ``inner``, which may compress them.
    """

    def __init__(
        self, group: Group, inner: AllReduceExchange, settings: LocalConfig, rate: float, momentum: float, last: int
    ) -> None:
        super().__init__(group)
        self._inner = inner
        self._every = settings.steps
        self._warmup = settings.warmup
        self._last = last
        self._rate = rate
        self._momentum = momentum
        self._phase = "local"
        self._ready = False
        replicated = ("outer_momentum/", "anchor/", *inner.traits.replicated)
        self.traits = replace(self.traits, replicas_diverge=True, replicated=replicated)

    def open(self, layout: FlatLayout, parameters: np.ndarray) -> None:
        """Begin a round from ``parameters``; reset the outer momentum."""
        self._inner.open(layout, parameters)
        self._layout = layout
        if not self._ready:
            self._anchor = Variable(parameters, trainable=False)
            self._velocity = Variable(np.zeros_like(parameters), trainable=False) if self._momentum else None
            self._ready = True
        self._anchor.assign(parameters)
        if self._velocity is not None:
            self._velocity.assign(np.zeros_like(parameters))

    @property
    def agreed(self) -> bool:  # type: ignore[override]
        """Whether a round has just ended."""
        return self._phase != "local"

    def begin(self, step: int) -> Hashable:
        """Return the step's phase: ``every`` in the warm-up, ``sync`` where a round or the run ends, else ``local``."""
        done = step + 1
        self._phase = "every" if step < self._warmup else "local"
        if self._phase == "local" and (done % self._every == 0 or done == self._last):
            self._phase = "sync"
        self.stands_for = 1 if self._phase == "every" else self.size
        return (self._phase, self._inner.begin(step) if self._phase == "sync" else None)

    def start(self, bucket: Tensor, index: int) -> Handle:
        """Sum the gradient over the ranks in the warm-up; afterwards return this rank's gradient."""
        return super().start(bucket, index) if self._phase == "every" else Done(bucket)

    def start_metrics(self, values: Tensor) -> Handle:
        """Sum the metrics over the ranks in the warm-up; afterwards return this rank's metrics."""
        return super().start_metrics(values) if self._phase == "every" else Done(values)

    def finish(self, parameters: Tensor) -> Tensor | None:
        """Return the parameters from which all ranks continue if a round has ended, else None."""
        if self._phase == "local":
            return None
        if self._phase == "every":
            self._anchor.assign(parameters)
            return None
        anchor = ops.convert_to_tensor(self._anchor)
        difference = anchor - parameters
        ranges = [self._layout.bucket_range(index) for index in range(len(self._layout.buckets))]
        handles = [self._inner.start(difference[a:b], index) for index, (a, b) in enumerate(ranges)]
        mean = ops.concatenate([handle.wait() for handle in handles]) * (1.0 / self.size)
        velocity = None if self._velocity is None else ops.convert_to_tensor(self._velocity)
        agreed, moved = outer_step(anchor, velocity, mean, self._rate, self._momentum)
        self._anchor.assign(agreed)
        if self._velocity is not None:
            self._velocity.assign(moved)
        return agreed

    def state(self) -> dict[str, np.ndarray]:
        """Return the outer momentum, the state of ``inner``, and within a round the parameters from which it began."""
        state = dict(self._inner.state())
        kept = {"outer_momentum": self._velocity, "anchor": None if self.agreed else self._anchor}
        for kind, variable in kept.items():
            if variable is not None:
                arrays = self._layout.unflatten(np.array(ops.convert_to_numpy(variable)))
                state.update({f"{kind}/{name}": array for name, array in arrays.items()})
        return state

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore what ``state`` returned; a momentum that is missing starts at zero."""
        self._inner.load_state(state)
        if self._velocity is not None:
            zeros = self._layout.unflatten(np.zeros(self._layout.size, np.float32))
            momentum = {name: state.get(f"outer_momentum/{name}", zero) for name, zero in zeros.items()}
            self._velocity.assign(self._layout.flatten(momentum))
        if anchor := {name.removeprefix("anchor/"): a for name, a in state.items() if name.startswith("anchor/")}:
            self._anchor.assign(self._layout.flatten(anchor))


def outer_step(
    anchor: Tensor, velocity: Tensor | None, mean: Tensor, rate: float, momentum: float
) -> tuple[Tensor, Tensor | None]:
    """Return parameters and velocity after an outer step by the mean difference, from the parameters ``anchor``.

    ``velocity``: of Nesterov's momentum before the step; None: there is none. All are ``[elements]``.
    """
    if velocity is not None:
        velocity = velocity * momentum + mean
        mean = velocity * momentum + mean
    return anchor - mean * rate, velocity
