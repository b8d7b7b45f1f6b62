"""0/1 Adam: ranks take steps by themselves between sums of one bit an element (Lu et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from keras import Variable, ops

from hvdlm.config import CommunicationConfig, TrainConfig
from hvdlm.parallel.flat_layout import FlatLayout
from hvdlm.protocols.compressor import Request
from hvdlm.protocols.group import Converted, Done, Group, Handle
from hvdlm.protocols.types import Tensor
from hvdlm.training.lr_schedule import make_schedule, warmup_steps
from hvdlm_compression.one_bit_adam import BLOCK, OneBitMomentum
from hvdlm_compression.updates import Direction, UpdateExchange

UPDATES = 16  # of the second moment, after which the steps between two of them double (section 6, kappa)
_ROUNDING = 1e-6  # of a rate that is a whole part of the peak
_RATE, _TOTAL, _PER_TOTAL, _FIRST, _SECOND = range(5)  # of ``ZeroOneMomentum.factors``


class ZeroOneMomentum(OneBitMomentum):
    """Algorithm 1 for one tensor; ``phase`` says what a step does.

    ``adam``: the gradients are summed dense, and both moments move. ``compressed`` and ``sync``: each rank moves its
    momentum by its own gradient, m_i = beta1 m_i + (1 - beta1) g_i, and adds rate x m_i to u_i, the sum since all ranks
    agreed last. The mean u of all u_i, compressed as in 1-bit Adam, makes m = u / (sum of rates). ``local``: nothing is
    sent. The second moment stays but in ``adam``.

    Attributes:
        phase: of the step.
        factors: Variable float32 ``[5]``: the step's learning rate, the sum of rates since all ranks agreed last, its
            inverse, and what corrects both moments, which started from zero (Kingma and Ba 2015, algorithm 1).
    """

    replicated: tuple[str, ...] = ("first_moment", "second_moment", "anchor", "steps")

    def __init__(self, train: TrainConfig, block: int, ranks: int) -> None:
        super().__init__(train, block, ranks)
        self.phase = "adam"
        self.factors: Any = None

    def begin(self, step: int) -> Hashable:
        """Return the phase."""
        return self.phase

    def memory(self, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Return moments, errors and u."""
        kept = {name: array for name, array in super().memory(shape).items() if name not in ("stage", "started")}
        return kept | {"since_sync": np.zeros(shape, np.float32)}

    def dense(self, gradient: Tensor, memory: Mapping[str, Any], step: Tensor) -> Direction:
        """Exchange ``[n]`` values that are not compressed."""
        return (yield from self._moved_by(gradient, memory, self._mean))

    def reduce(self, gradient: Tensor, memory: Mapping[str, Any], step: Tensor) -> Direction:
        """Exchange ``[n]`` values, of one bit each but in the phase ``adam``."""
        return (yield from self._moved_by(gradient, memory, self.compressed_mean))

    def _mean(self, own: Tensor, memory: Mapping[str, Any]) -> Direction:
        return (yield Request("all_reduce", [own]))[0] / float(self.ranks)

    def _moved_by(self, gradient: Tensor, memory: Mapping[str, Any], mean: Callable[..., Direction]) -> Direction:
        factors = ops.convert_to_tensor(self.factors)
        second = ops.convert_to_tensor(memory["second_moment"])
        if self.phase == "adam":
            gradient = yield from self._mean(gradient, memory)
            second = self.moved(second, gradient * gradient, self._train.beta2)
            memory["second_moment"].assign(second)
        first = self.moved(memory["first_moment"], gradient, self._train.beta1)
        if self.phase != "adam":
            since_sync = ops.convert_to_tensor(memory["since_sync"]) + first * factors[_RATE]
            if self.phase != "local":
                first = (yield from mean(since_sync, memory)) * factors[_PER_TOTAL]
                since_sync = ops.zeros_like(since_sync)
            memory["since_sync"].assign(since_sync)
        memory["first_moment"].assign(first)
        direction = self.direction if self.phase == "adam" else self.bounded
        return direction(first * factors[_FIRST], second * factors[_SECOND])


class ZeroOneAdam(UpdateExchange):
    """0/1 Adam (Lu et al. 2022, algorithm 1) with the policies of its section 6.

    The second moment is updated at 17 steps in a row, then at every 2nd of 32, every 4th of 64, and so on, as long as
    ranks agree after every step. They do while the learning rate rises or is near its peak; where it is the peak / n,
    up to n steps pass between two sums: the largest divisor of ``communication.local.steps`` that is at most n.

    In a step that updates the second moment, the dense mean gradient is known, and moves the momentum as well: the
    paper sends its momentum compressed in these steps, too.
    """

    def __init__(self, group: Group, train: TrainConfig, options: CommunicationConfig) -> None:
        rule = ZeroOneMomentum(train, options.compression.block or BLOCK, len(group.ranks))
        super().__init__(group, rule, options)
        self.traits = replace(self.traits, replicas_diverge=True)
        self._train = train
        self._momentum = rule
        self._rate = make_schedule(train)
        self._alone = max(warmup_steps(train), options.local.warmup)  # the first step that may be a rank's own
        self._settled = max(UPDATES, round(1.0 / (1.0 - train.beta2)))  # steps over which the second moment averages
        steps = options.local.steps
        self._intervals = [interval for interval in range(1, steps + 1) if steps % interval == 0]
        self._anchor: Any = None
        self._restart()

    def _restart(self) -> None:
        """Begin with moments of zero."""
        self._updates, self._next, self._first, self._since = 0, 0, 0, 0
        self._momentum.phase = "adam"

    def open(self, layout: FlatLayout, parameters: np.ndarray) -> None:
        """Begin an interval from ``parameters``; reset all that is kept."""
        if self._anchor is None:
            self._anchor = Variable(parameters, trainable=False)
            self._layout = layout
            self._decay = layout.decay_mask() * np.float32(self._train.weight_decay)
            self._momentum.factors = Variable(np.ones(5, np.float32), trainable=False)
            self._directions: list[Any] = [None] * len(layout.buckets)
        super().open(layout, parameters)
        self._anchor.assign(parameters)
        self._restart()

    @property
    def agreed(self) -> bool:  # type: ignore[override]
        """Whether the last step was not a rank's own."""
        return self._momentum.phase != "local"

    def begin(self, step: int) -> Hashable:
        """Choose what the step does; return its phase."""
        rate = self._rate(step)
        if self.agreed:
            self._since = step
        if not self._updates:
            self._first = step
        interval = self._interval(step, rate)
        if interval > 1:
            ends = (step + 1) % interval == 0 or step + 1 == self._train.steps
            phase = "sync" if ends else "local"
        elif not self.agreed:
            phase = "sync"
        elif step >= self._next:
            phase = "adam"
            self._next = step + 2 ** (self._updates // UPDATES)
            self._updates += 1
        else:
            phase = "compressed"
        self._momentum.phase = phase
        corrections = [1.0 - self._train.beta1 ** (step + 1 - self._first), 1.0 - self._train.beta2**self._updates]
        total = sum(self._rate(earlier) for earlier in range(self._since, step + 1))
        values = [rate, total, *(1.0 / value if value else 0.0 for value in (total, *corrections))]
        self._momentum.factors.assign(np.array(values, np.float32))
        return super().begin(step)

    def _interval(self, step: int, rate: float) -> int:
        """Return the steps from one agreement to the next, at this step's learning rate."""
        if step < self._alone or step - self._first < self._settled:
            return 1
        return max(n for n in self._intervals if n == 1 or n * rate <= self._train.learning_rate * (1.0 + _ROUNDING))

    def start(self, bucket: Tensor, index: int) -> Handle:
        """Start to exchange the flat bucket; the handle's result is its direction, ``[elements]``."""
        handle = super().start(bucket, index)
        if self._momentum.phase != "sync":
            return handle

        def keep(direction: Tensor) -> Tensor:
            self._directions[index] = direction
            return direction

        return Converted(handle, keep)

    def start_metrics(self, values: Tensor) -> Handle:
        """Sum the metrics; in a step of its own, return this rank's as if all had the same."""
        return Done(values * float(self.size)) if self._momentum.phase == "local" else super().start_metrics(values)

    def finish(self, parameters: Tensor) -> Tensor | None:
        """Return, where ranks agree again, the parameters that all of them continue from: one step from the last."""
        if self._momentum.phase == "local":
            return None
        if self._momentum.phase != "sync":
            self._anchor.assign(parameters)
            return None
        anchor = ops.convert_to_tensor(self._anchor)
        direction = ops.concatenate(self._directions)
        self._directions = [None] * len(self._directions)
        if self._train.weight_decay:
            direction = direction + anchor * ops.convert_to_tensor(self._decay)
        total = ops.convert_to_tensor(self._momentum.factors)[_TOTAL]
        agreed = anchor - direction * total
        self._anchor.assign(agreed)
        return agreed

    def settle(self, applied: Tensor) -> None:
        """Restore moments and errors unless the step is ``applied``, but not where ranks agree again.

        There, ``finish`` replaces the parameters also in a step that is skipped: what ranks have summed since they
        agreed last is part of them, and the momentum is that of all.
        """
        if self._momentum.phase != "sync":
            super().settle(applied)

    def state(self) -> dict[str, np.ndarray]:
        """Return moments, errors and counts; between two agreements, what a rank has of its own, too."""
        state = super().state()
        counts = [self._updates, self._next, self._first, self._since]
        state[f"steps/{self._layout.slots[0].name}"] = np.array(counts, np.int64)
        if self.agreed:  # u is zero
            return {name: array for name, array in state.items() if not name.startswith("since_sync/")}
        anchor = self._layout.unflatten(np.array(ops.convert_to_numpy(self._anchor)))
        state = {name.replace("first_moment/", "own_moment/", 1): array for name, array in state.items()}
        return state | {f"anchor/{name}": array for name, array in anchor.items()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore what ``state`` returned; without it, start anew."""
        super().load_state({name.replace("own_moment/", "first_moment/", 1): array for name, array in state.items()})
        self._restart()
        counts = state.get(f"steps/{self._layout.slots[0].name}")
        if counts is None:
            return
        self._updates, self._next, self._first, self._since = counts.tolist()
        anchor = {name.removeprefix("anchor/"): a for name, a in state.items() if name.startswith("anchor/")}
        if anchor:
            self._anchor.assign(self._layout.flatten(anchor))
            self._momentum.phase = "local"
