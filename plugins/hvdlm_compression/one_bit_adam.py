"""1-bit Adam: momentum of one bit an element, divided by a second moment that no longer changes (Tang et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
from keras import ops

from hvdlm.config import CommunicationConfig, TrainConfig
from hvdlm.parallel.flat_layout import FlatLayout
from hvdlm.protocols.compressor import Request
from hvdlm.protocols.group import Group
from hvdlm.protocols.types import Tensor
from hvdlm.training.lr_schedule import warmup_steps
from hvdlm_compression.bits import pack
from hvdlm_compression.scaled_sign import signs
from hvdlm_compression.updates import Direction, UpdateExchange

STABLE = 0.96  # of norms of the second moment: from this ratio on, it no longer changes (section 7.1)
BLOCK = 1024  # elements that share a scale, unless ``communication.compression.block`` is set


class OneBitMomentum:
    """Algorithm 1 for one tensor; ``frozen`` says in which stage.

    Stage 1 is Adam (Kingma and Ba 2015) on dense sums. In stage 2, every rank adds its gradient to the momentum that
    all ranks agree on, m_i = beta1 m + (1 - beta1) g_i, and sends C(m_i + e_i), with C(x) = (||x||_1 / n) sign(x) for
    each block. Each rank averages one chunk of all ranks' vectors, and sends C(chunk + e'). What all receive is the
    next m. The errors e and e' of both compressions are kept. The direction is m / (sqrt(v) + epsilon), in stage 2 at
    most 1 an element.
    """

    matrices = False
    biased = False
    feeds_back = True
    replicated: tuple[str, ...] = ("first_moment", "second_moment", "stage", "started")

    def __init__(self, train: TrainConfig, block: int, ranks: int) -> None:
        self._train = train
        self._block = block
        self.ranks = ranks
        self.frozen = False

    def begin(self, step: int) -> Hashable:
        """Return the stage's name."""
        return "compressed" if self.frozen else "adam"

    def _blocks(self, elements: int) -> int:
        """Return the blocks of a tensor, a multiple of the ranks: each averages as many."""
        return -(-elements // (self._block * self.ranks)) * self.ranks

    def payload_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of both rounds of stage 2."""
        sent = self._blocks(math.prod(shape)) * (self._block // 8 + 4)
        return sent + sent // self.ranks

    def memory(self, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Return both moments and both errors.

        ``stage``: the second moment's last norm, and the step of the freeze; ``started``: the step before which both
        moments were zero.
        """
        elements = math.prod(shape)
        chunk = self._blocks(elements) * self._block // self.ranks
        zeros = {name: np.zeros(shape, np.float32) for name in ("first_moment", "second_moment", "error")}
        stage = {"stage": np.zeros(2, np.float32), "started": np.zeros(1, np.float32)}
        return zeros | {"chunk_error": np.zeros(chunk, np.float32)} | stage

    def dense(self, gradient: Tensor, memory: Mapping[str, Any], step: Tensor) -> Direction:
        """Sum the gradient as it is; the moments follow Adam, the second one in stage 1 only."""
        total = (yield Request("all_reduce", [gradient]))[0] / float(self.ranks)
        first = self.moved(memory["first_moment"], total, self._train.beta1)
        memory["first_moment"].assign(first)
        if self.frozen:
            return self.bounded(first, memory["second_moment"])
        second = self.moved(memory["second_moment"], total * total, self._train.beta2)
        memory["second_moment"].assign(second)
        count = ops.cast(step + 1, "float32") - ops.convert_to_tensor(memory["started"])
        # In float32, 1 - beta ** count would lose half of its digits where beta is near 1.
        first, second = (
            moment / -ops.expm1(count * math.log(beta)) if beta > 0 else moment
            for moment, beta in ((first, self._train.beta1), (second, self._train.beta2))
        )
        return self.direction(first, second)

    def reduce(self, gradient: Tensor, memory: Mapping[str, Any], step: Tensor) -> Direction:
        """Exchange the gradient in stage 1, the momentum in stage 2."""
        if not self.frozen:
            return (yield from self.dense(gradient, memory, step))
        first = yield from self.compressed_mean(self.moved(memory["first_moment"], gradient, self._train.beta1), memory)
        memory["first_moment"].assign(first)
        return self.bounded(first, memory["second_moment"])

    def compressed_mean(self, own: Tensor, memory: Mapping[str, Any]) -> Direction:
        """Return the mean of all ranks' ``own`` ``[n]``, compressed twice; both errors go into ``memory``."""
        elements = own.shape[0]
        own = own + ops.convert_to_tensor(memory["error"])
        blocks = self._blocks(elements)
        rows = ops.reshape(ops.pad(own, [[0, blocks * self._block - elements]]), (blocks, self._block))
        counts = np.clip(elements - self._block * np.arange(blocks), 0, self._block).astype(np.float32)
        sent = self._encoded(rows, counts)
        memory["error"].assign(own - self._decoded(sent, elements))
        received = yield Request("all_to_all", [ops.reshape(sent, (-1,))])
        chunks = ops.reshape(received[0], (self.ranks, blocks // self.ranks, -1))
        chunk = self._decoded(chunks[0])
        for rank in range(1, self.ranks):
            chunk = chunk + self._decoded(chunks[rank])
        chunk = chunk / float(self.ranks) + ops.convert_to_tensor(memory["chunk_error"])
        # Which of the last chunk's elements are none is the same for every rank's compression of it: scales of empty
        # blocks are means of padding, which nothing reads.
        rows = ops.reshape(chunk, (blocks // self.ranks, self._block))
        sent = self._encoded(rows, np.full(blocks // self.ranks, self._block, np.float32))
        memory["chunk_error"].assign(chunk - self._decoded(sent))
        gathered = yield Request("all_gather", [sent])
        return self._decoded(ops.reshape(gathered[0], (blocks, -1)), elements)

    def moved(self, mean: Any, value: Tensor, beta: float) -> Tensor:
        """Return the exponential moving average after ``value``."""
        return ops.convert_to_tensor(mean) * beta + value * (1.0 - beta)

    def direction(self, first: Tensor, second: Tensor) -> Tensor:
        """Return Adam's direction of both moments."""
        return first / (ops.sqrt(second) + self._train.epsilon)

    def bounded(self, first: Tensor, second: Any) -> Tensor:
        """Return the direction of moments that are not of the same gradients: at most 1 an element, where it is finite.

        With the default betas, Adam's own is about that at most (Kingma and Ba 2015, section 2.1), since both moments
        are of one gradient. A scale of one bit is that of a whole block, and the second moment of an element that had
        hardly a gradient when it was updated last (the embedding of a rare token) is nearly zero.
        """
        direction = self.direction(first, ops.convert_to_tensor(second))
        return ops.where(ops.isfinite(direction), ops.clip(direction, -1.0, 1.0), direction)  # a step to be skipped

    def _encoded(self, rows: Tensor, counts: np.ndarray) -> Tensor:
        """Return uint8 ``[blocks, 4 + block / 8]``: scales and signs of ``rows``, which have ``counts`` elements."""
        scales = ops.sum(ops.abs(rows), axis=1) / ops.convert_to_tensor(np.maximum(counts, 1.0))
        packed = pack(ops.cast(rows >= 0.0, "float32"), 1)
        return ops.concatenate([ops.reshape(ops.view(scales, "uint8"), (-1, 4)), packed], axis=1)

    def _decoded(self, encoded: Tensor, elements: int | None = None) -> Tensor:
        """Return the first ``elements`` of what ``_encoded`` encoded, float32 ``[elements]``."""
        scales = ops.view(ops.reshape(encoded[:, :4], (-1,)), "float32")
        values = ops.reshape(signs(encoded[:, 4:]) * ops.expand_dims(scales, -1), (-1,))
        return values if elements is None else values[:elements]


class OneBitAdam(UpdateExchange):
    """1-bit Adam; the second moment is frozen when it has become stable, or after a given number of steps.

    Stable (section 7.1): the norms ||v||_1 of steps that are 1 / (1 - beta2) apart differ by at most 4%, after the
    learning rate's warm-up. All ranks have the same sums, so that they decide alike.
    """

    def __init__(self, group: Group, train: TrainConfig, options: CommunicationConfig) -> None:
        rule = OneBitMomentum(train, options.compression.block or BLOCK, len(group.ranks))
        super().__init__(group, rule, options)
        self._train = train
        self._momentum = rule
        self._freeze_step = options.compression.start_after_steps
        self._interval = max(1, round(1.0 / (1.0 - train.beta2))) if train.beta2 < 1.0 else 1
        self._warmup = warmup_steps(train)
        self._norm = 0.0
        self._started: int | None = None  # None: at the next step

    def open(self, layout: FlatLayout, parameters: np.ndarray) -> None:
        """Start in stage 1."""
        super().open(layout, parameters)
        self._momentum.frozen, self._norm, self._started = False, 0.0, None

    def begin(self, step: int) -> Hashable:
        """Freeze the second moment where it is due; return the stage."""
        if self._started is None:
            self._started = step
            for unit in self.units():
                unit.memory["started"].assign(np.array([step], np.float32))
        if not self._momentum.frozen and step > self._started:
            if self._freeze_step:
                if step - self._started >= self._freeze_step:
                    self._freeze(step)
            elif step % self._interval == 0:
                self._test(step)
        return super().begin(step)

    def _test(self, step: int) -> None:
        norm = sum(float(ops.sum(ops.convert_to_tensor(u.memory["second_moment"]))) for u in self.units())
        before, self._norm = self._norm, norm
        if before and step >= self._warmup and min(before, norm) >= STABLE * max(before, norm):
            self._freeze(step)
        else:
            self._keep(norm, 0)

    def _freeze(self, step: int) -> None:
        """Begin stage 2: correct the second moment's bias once, since it stays."""
        assert self._started is not None
        self._momentum.frozen = True
        correction = 1.0 - self._train.beta2 ** (step - self._started)
        for unit in self.units():
            second = unit.memory["second_moment"]
            second.assign(ops.convert_to_tensor(second) / correction)
        self._keep(self._norm, step)

    def _keep(self, norm: float, frozen_at: int) -> None:
        for unit in self.units():
            unit.memory["stage"].assign(np.array([norm, frozen_at], np.float32))

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore moments, errors and the stage; without them, start with the first stage."""
        super().load_state(state)
        stages = [np.asarray(ops.convert_to_numpy(unit.memory["stage"])) for unit in self.units()[:1]]
        self._norm, frozen_at = stages[0].tolist() if stages else (0.0, 0.0)
        self._momentum.frozen = frozen_at > 0
        started = [np.asarray(ops.convert_to_numpy(unit.memory["started"])) for unit in self.units()[:1]]
        has_moments = any(name.startswith("first_moment/") for name in state)
        self._started = int(started[0][0]) if has_moments and started else None
