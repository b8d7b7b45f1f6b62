"""The exchange that compresses: what all algorithms share (error feedback, what stays dense, fusing, checkpoints)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import Variable, ops

from hvdlm.communication.all_reduce import AllReduceExchange
from hvdlm.config import CommunicationConfig
from hvdlm.errors import HvdlmError
from hvdlm.parallel.flat_layout import FlatLayout, Slot
from hvdlm.protocols.compressor import Compressor
from hvdlm.protocols.group import Group, Handle
from hvdlm.protocols.types import Tensor
from hvdlm_compression.rounds import Rounds, dense


@dataclass
class Unit:
    """What is compressed as one tensor of ``shape``: a matrix, or all compressible slots of a bucket as a vector."""

    slots: tuple[Slot, ...]
    shape: tuple[int, ...]
    error: Any
    memory: dict[str, Any]


@dataclass
class Bucket:
    """A bucket's units and the slots that stay dense; ``start`` is its place in the flat vector."""

    start: int
    units: list[Unit]
    dense: tuple[Slot, ...]


class CompressedExchange(AllReduceExchange):
    """Sums compressed gradients.

    Error feedback (Karimireddy et al. 2019, algorithm 2): p = g + e is compressed; e = p - what the others see of p.
    """

    def __init__(self, group: Group, compressor: Compressor, options: CommunicationConfig) -> None:
        super().__init__(group, options)
        self.compressor, self._settings = compressor, options.compression
        wanted = self._settings.error_feedback
        self._feedback = (compressor.biased if wanted is None else wanted) and not compressor.feeds_back
        self._buckets: list[Bucket] = []
        self._dense = False
        self._flying: list[_Flight] = []

    def open(self, layout: FlatLayout, parameters: np.ndarray) -> None:
        """Decide what is compressed, and forget all errors."""
        if self._buckets:
            self.load_state({})
            return
        self._step = Variable(np.int32(0), dtype="int32", trainable=False)
        gains: dict[tuple[int, ...], bool] = {}
        for index, (first, last) in enumerate(layout.buckets):
            slots = layout.slots[first:last]
            for slot in slots:
                shape = self._shape(slot)
                gains.setdefault(shape, self._gains(shape))
            sent = tuple(slot for slot in slots if gains[self._shape(slot)])
            rest = tuple(slot for slot in slots if not gains[self._shape(slot)])
            groups = [(slot,) for slot in sent] if self.compressor.matrices else [sent] if sent else []
            self._buckets.append(Bucket(layout.bucket_range(index)[0], [self._unit(g) for g in groups], rest))

    def _shape(self, slot: Slot) -> tuple[int, ...]:
        """Return the shape in which the algorithm sees a slot: a matrix keeps its first axis."""
        if self.compressor.matrices and len(slot.shape) > 1:
            return (slot.shape[0], (slot.stop - slot.start) // slot.shape[0])
        return (slot.stop - slot.start,)

    def _gains(self, shape: tuple[int, ...]) -> bool:
        elements = int(np.prod(shape))
        if elements < self._settings.min_elements or (self.compressor.matrices and len(shape) < 2):
            return False
        return 4 * elements >= self._settings.min_compression * self.compressor.payload_bytes(shape)

    def _unit(self, slots: tuple[Slot, ...]) -> Unit:
        shape = self._shape(slots[0]) if self.compressor.matrices else (sum(s.stop - s.start for s in slots),)
        error = Variable(np.zeros(shape, np.float32), trainable=False) if self._feedback else None
        memory = {k: Variable(v, trainable=False) for k, v in self.compressor.memory(shape).items()}
        return Unit(slots, shape, error, memory)

    def begin(self, step: int) -> Hashable:
        """Tell the step to the algorithm; return whether it compresses, and its own phase."""
        self._flying = []
        self._dense = step < self._settings.start_after_steps
        self._step.assign(np.int32(step))
        return "dense" if self._dense else self.compressor.begin(step)

    def start(self, bucket: Tensor, index: int) -> Handle:
        """Begin to sum the flat bucket; see ``interfaces.Exchange``."""
        if self._dense or not self._buckets[index].units:
            return super().start(bucket, index)
        scaled = bucket * self._before if self._before != 1.0 else bucket
        flight = _Flight(self._buckets[index], self._rounds(scaled, index), self._after, self._land)
        self._flying.append(flight)
        return flight

    def _rounds(self, bucket: Tensor, index: int) -> Rounds:
        plan = self._buckets[index]
        step = ops.convert_to_tensor(self._step)
        jobs = [self._job(unit, self._gather(bucket, plan, unit.slots), step) for unit in plan.units]
        if plan.dense:
            jobs.append(dense(self._gather(bucket, plan, plan.dense)))
        return Rounds(self._group, f"gradients.{index}", jobs)

    def _gather(self, bucket: Tensor, plan: Bucket, slots: tuple[Slot, ...]) -> Tensor:
        if slots[0].start == plan.start and slots[-1].stop - plan.start == bucket.shape[0] and not plan.dense:
            return bucket if len(plan.units) == 1 else bucket[: bucket.shape[0]]
        parts = [bucket[slot.start - plan.start : slot.stop - plan.start] for slot in slots]
        return parts[0] if len(parts) == 1 else ops.concatenate(parts)

    def _job(self, unit: Unit, part: Tensor, step: Tensor) -> Any:
        """Compress with error feedback; a generator as ``Compressor.reduce``."""
        tensor = ops.reshape(part, unit.shape)
        if unit.error is not None:
            tensor = tensor + ops.convert_to_tensor(unit.error)
        total, contribution = yield from self.compressor.reduce(tensor, unit.memory, step)
        if unit.error is not None:
            unit.error.assign(tensor - contribution())
        return ops.reshape(total, (-1,))

    def _land(self) -> None:
        """Go on with all flights round by round, so that those of one round travel together."""
        going = True
        while going:
            # Every flight advances before the answer counts: any() of a generator would stop at the first.
            advanced = [flight.rounds.advance() for flight in self._flying]
            going = any(advanced)

    def state(self) -> dict[str, np.ndarray]:
        """Return errors and memories: by parameter name where they have its elements, else by the unit's first."""
        found = {}
        for unit, kind, variable in self._variables():
            array = np.array(ops.convert_to_numpy(variable))
            for name, (start, stop), shape in _places(unit, array.shape):
                found[f"{kind}/{name}"] = array.reshape(-1)[start:stop].reshape(shape)
        return found

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what ``state`` returned; what is missing starts afresh."""
        for unit, kind, variable in self._variables():
            fresh = self.compressor.memory(unit.shape).get(kind)
            array = np.zeros(unit.shape, np.float32) if fresh is None else fresh.copy()
            for name, (start, stop), shape in _places(unit, array.shape):
                saved = state.get(f"{kind}/{name}")
                if saved is None:
                    continue
                if saved.shape != shape:
                    raise HvdlmError(
                        f"the checkpoint's exchange/{kind}/{name} has shape {list(saved.shape)}, expected "
                        f"{list(shape)}: resume with the compression settings it was trained with (RUN/config.yaml)."
                    )
                array.reshape(-1)[start:stop] = saved.reshape(-1)
            variable.assign(array)

    def _variables(self) -> list[tuple[Unit, str, Any]]:
        found: list[tuple[Unit, str, Any]] = []
        for unit in (unit for bucket in self._buckets for unit in bucket.units):
            found += [(unit, "error", unit.error)] if unit.error is not None else []
            found += [(unit, kind, variable) for kind, variable in unit.memory.items()]
        return found


def _places(unit: Unit, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, int], tuple[int, ...]]]:
    """Return (parameter name, elements, shape) of the parts of an array that belongs to ``unit``."""
    if shape != unit.shape:
        return [(unit.slots[0].name, (0, int(np.prod(shape))), shape)]
    found, start = [], 0
    for slot in unit.slots:
        size = slot.stop - slot.start
        found.append((slot.name, (start, start + size), slot.shape))
        start += size
    return found


class _Flight:
    """A bucket under way."""

    def __init__(self, bucket: Bucket, rounds: Rounds, factor: float, land: Callable[[], None]) -> None:
        self._bucket, self.rounds, self._factor, self._land = bucket, rounds, factor, land

    def wait(self) -> Tensor:
        """Return the flat sum."""
        self._land()
        parts: dict[str, Tensor] = {}
        owners = [*(unit.slots for unit in self._bucket.units), *([self._bucket.dense] if self._bucket.dense else [])]
        for slots, result in zip(owners, self.rounds.results, strict=True):
            start = 0
            for slot in slots:
                parts[slot.name] = (slot.start, result[start : start + slot.stop - slot.start])
                start += slot.stop - slot.start
        ordered = [part for _, part in sorted(parts.values(), key=lambda item: item[0])]
        whole = ordered[0] if len(ordered) == 1 else ops.concatenate(ordered)
        return whole if self._factor == 1.0 else whole * self._factor
