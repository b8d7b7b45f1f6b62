"""Exchange of compressed gradients: error feedback, dense tensors, fusion and checkpoints of all algorithms."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from keras import Variable, ops

from hvdlm.communication.all_reduce import AllReduceExchange
from hvdlm.config import CommunicationConfig
from hvdlm.errors import HvdlmError
from hvdlm.parallel.flat_layout import FlatLayout, Slot
from hvdlm.planning.payloads import smallest_compressed
from hvdlm.protocols.compressor import Compressor
from hvdlm.protocols.group import Group, Handle
from hvdlm.protocols.types import Tensor
from hvdlm_compression import tensor_ops
from hvdlm_compression.compressor import ReducesWithError
from hvdlm_compression.rounds import Rounds, dense


@dataclass
class Unit:
    """One tensor to compress, of ``shape``: a matrix, or all compressible slots of a bucket as a vector.

    Attributes:
        error: the error feedback's Variable; None: no error feedback.
        memory: the compressor's own Variables.
    """

    slots: tuple[Slot, ...]
    shape: tuple[int, ...]
    error: Any
    memory: dict[str, Any]


@dataclass
class Bucket:
    """A bucket's units and its slots that stay dense; ``start`` is its offset in the flat vector."""

    start: int
    units: list[Unit]
    dense: tuple[Slot, ...]


class CompressedExchange(AllReduceExchange):
    """Sums compressed gradients.

    Error feedback (Karimireddy et al. 2019, algorithm 2): p = g + e, where C(p) is sent and e = p - C(p) is kept.
    """

    def __init__(self, group: Group, compressor: Compressor, options: CommunicationConfig) -> None:
        super().__init__(group, options)
        self.compressor = compressor
        self._settings = options.compression
        self._smallest = smallest_compressed(options.compression)
        feedback = self._settings.error_feedback
        if feedback is None:
            feedback = compressor.biased
        self.traits = replace(self.traits, replicated=tuple(f"{kind}/" for kind in compressor.replicated))
        self._feedback = feedback and not compressor.feeds_back
        self._buckets: list[Bucket] = []
        self._dense = False
        self._keeps_copies = False
        self._copies: list[tuple[Any, Any]] = []  # Variables of errors and memories, and those of their copies
        self._in_flight: list[_CompressedSum] = []

    def open(self, layout: FlatLayout, parameters: np.ndarray) -> None:
        """Decide which slots are compressed, and reset all errors."""
        if self._buckets:
            self.load_state({})
            return
        self._step = Variable(np.int32(0), dtype="int32", trainable=False)
        compressible: dict[tuple[int, ...], bool] = {}
        for index, (first, last) in enumerate(layout.buckets):
            slots = layout.slots[first:last]
            for slot in slots:
                shape = self._shape(slot)
                compressible.setdefault(shape, self._is_compressible(shape))
            compressed = tuple(slot for slot in slots if compressible[self._shape(slot)])
            uncompressed = tuple(slot for slot in slots if not compressible[self._shape(slot)])
            if self.compressor.matrices:
                units = [self._unit((slot,)) for slot in compressed]
            else:
                units = [self._unit(compressed)] if compressed else []
            self._buckets.append(Bucket(layout.bucket_range(index)[0], units, uncompressed))

    def _shape(self, slot: Slot) -> tuple[int, ...]:
        """Return the shape in which a slot is compressed: a matrix keeps its first axis."""
        if self.compressor.matrices and len(slot.shape) > 1:
            return (slot.shape[0], (slot.stop - slot.start) // slot.shape[0])
        return (slot.stop - slot.start,)

    def _is_compressible(self, shape: tuple[int, ...]) -> bool:
        """Return whether a slot is large enough and its payload small enough."""
        elements = int(np.prod(shape))
        if elements < self._smallest or (self.compressor.matrices and len(shape) < 2):
            return False
        return 4 * elements >= self._settings.min_compression * self.compressor.payload_bytes(shape)

    def _unit(self, slots: tuple[Slot, ...]) -> Unit:
        shape = self._shape(slots[0]) if self.compressor.matrices else (sum(s.stop - s.start for s in slots),)
        error = Variable(np.zeros(shape, np.float32), trainable=False) if self._feedback else None
        memory = {k: Variable(v, trainable=False) for k, v in self.compressor.memory(shape).items()}
        return Unit(slots, shape, error, memory)

    def begin(self, step: int) -> Hashable:
        """Begin a step; return its phase: ``dense`` before compression starts, else the algorithm's own."""
        self._in_flight = []
        self._dense = step < self._settings.start_after_steps
        self._step.assign(np.int32(step))
        if self._dense:
            return "dense"
        self._copy_state()
        return self.compressor.begin(step)

    def keep_copies(self) -> None:
        """Copy errors and memories where a step begins."""
        self._keeps_copies = True

    def _copy_state(self) -> None:
        if not self._keeps_copies:
            return
        if not self._copies:
            pairs = [(one, ops.convert_to_numpy(one)) for _, _, one in self._variables()]
            self._copies = [(one, Variable(values, dtype=one.dtype, trainable=False)) for one, values in pairs]
        for one, copy in self._copies:
            copy.assign(one)

    def settle(self, applied: Tensor) -> None:
        """Restore errors and memories from before the step unless it is ``applied``."""
        if not self._dense and self._copies:
            tensor_ops.restore_unless(applied, self._copies)

    def start(self, bucket: Tensor, index: int) -> Handle:
        """Start to sum the flat bucket."""
        if self._dense or not self._buckets[index].units:
            return super().start(bucket, index)
        scaled = bucket * self._before if self._before != 1.0 else bucket
        # The handles of a later step have a list of their own: those of several steps may be in flight.
        finish = partial(_finish_rounds, self._in_flight)
        handle = _CompressedSum(self._buckets[index], scaled, self._rounds(scaled, index), self._after, finish)
        self._in_flight.append(handle)
        return handle

    def _rounds(self, bucket: Tensor, index: int) -> Rounds:
        plan = self._buckets[index]
        # A copy: in PyTorch the tensor is the Variable's own, and a sum may be finished in a later step.
        step = ops.copy(ops.convert_to_tensor(self._step))
        jobs = [self._job(unit, self._gather(bucket, plan, unit.slots), step) for unit in plan.units]
        if plan.dense:
            jobs.append(dense(self._gather(bucket, plan, plan.dense)))
        return Rounds(self._group, f"gradients.{index}", jobs)

    def _gather(self, bucket: Tensor, plan: Bucket, slots: tuple[Slot, ...]) -> Tensor:
        """Return the elements of ``slots`` as one vector."""
        if sum(slot.stop - slot.start for slot in slots) == bucket.shape[0]:
            return bucket
        vectors = [bucket[slot.start - plan.start : slot.stop - plan.start] for slot in slots]
        return vectors[0] if len(vectors) == 1 else ops.concatenate(vectors)

    def _job(self, unit: Unit, vector: Tensor, step: Tensor) -> Any:
        """Sum a unit with error feedback; a generator of requests like ``Compressor.reduce``."""
        tensor = tensor_ops.reshape(vector, unit.shape)
        if isinstance(self.compressor, ReducesWithError):
            total = yield from self.compressor.reduce_with_error(tensor, unit.error, unit.memory)
            return tensor_ops.reshape(total, (-1,))
        if unit.error is not None:
            tensor = tensor + ops.convert_to_tensor(unit.error)
        total, contribution = yield from self.compressor.reduce(tensor, unit.memory, step)
        if unit.error is not None:
            unit.error.assign(tensor - contribution())
        return ops.reshape(total, (-1,))

    def error_norm(self) -> float | None:
        """Return the norm of this rank's error feedback, in the scale of its buckets; None: there is none."""
        errors = [unit.error for bucket in self._buckets for unit in bucket.units if unit.error is not None]
        squares = [float(ops.convert_to_numpy(ops.sum(ops.square(ops.convert_to_tensor(e))))) for e in errors]
        return math.sqrt(sum(squares)) if squares else None

    def state(self) -> dict[str, np.ndarray]:
        """Return errors and memories: by parameter where the sizes match, else by the unit's first parameter."""
        arrays = {}
        for unit, kind, variable in self._variables():
            array = np.array(ops.convert_to_numpy(variable))
            for name, (start, stop), shape in _by_parameter(unit, array.shape):
                arrays[f"{kind}/{name}"] = array.reshape(-1)[start:stop].reshape(shape)
        return arrays

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore what ``state`` returned; arrays that are missing get their initial values."""
        for unit, kind, variable in self._variables():
            initial = self.compressor.memory(unit.shape).get(kind)
            array = np.zeros(unit.shape, np.float32) if initial is None else initial.copy()
            for name, (start, stop), shape in _by_parameter(unit, array.shape):
                saved = state.get(f"{kind}/{name}")
                if saved is None:
                    continue
                if saved.shape != shape:
                    raise HvdlmError(
                        f"the checkpoint's exchange/{kind}/{name} has shape {list(saved.shape)}, expected "
                        f"{list(shape)}: resume with the compression settings it was trained with (RUN/config.yaml)."
                    )
                array.reshape(-1)[start:stop] = saved.reshape(-1)
            # A sum: TensorFlow takes numpy's memory as it is, and adds in another order where it is less aligned.
            variable.assign(ops.add(array, 0))

    def _variables(self) -> list[tuple[Unit, str, Any]]:
        """Return (unit, kind, Variable) of all errors and memories."""
        variables: list[tuple[Unit, str, Any]] = []
        for unit in (unit for bucket in self._buckets for unit in bucket.units):
            if unit.error is not None:
                variables.append((unit, "error", unit.error))
            variables += [(unit, kind, variable) for kind, variable in unit.memory.items()]
        return variables


def assembled(bucket: Bucket, totals: Sequence[Tensor], flat: Tensor | None = None) -> Tensor:
    """Return the flat float32 bucket of the sums of its units, and of its dense slots as one vector, if it has any.

    ``flat``: the vector of which the bucket was summed; it is overwritten where the framework can do that.
    """
    if len(totals) == 1:
        return ops.cast(totals[0], "float32") if flat is None else tensor_ops.store(flat, totals[0])
    by_start: dict[int, Tensor] = {}
    slots_of_totals = [unit.slots for unit in bucket.units]
    if bucket.dense:
        slots_of_totals.append(bucket.dense)
    for slots, total in zip(slots_of_totals, totals, strict=True):
        start = 0
        for slot in slots:
            by_start[slot.start] = total[start : start + slot.stop - slot.start]
            start += slot.stop - slot.start
    if tensor_ops.OVERWRITES and flat is not None:
        for start, total in by_start.items():
            tensor_ops.store(flat[start - bucket.start : start - bucket.start + total.shape[0]], total)
        return flat
    ordered = [ops.cast(total, "float32") for _, total in sorted(by_start.items())]
    return ordered[0] if len(ordered) == 1 else ops.concatenate(ordered)


def _by_parameter(unit: Unit, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, int], tuple[int, ...]]]:
    """Return (name, range of elements, shape) of each parameter within an array of ``unit``."""
    if shape != unit.shape:
        return [(unit.slots[0].name, (0, int(np.prod(shape))), shape)]
    ranges = []
    start = 0
    for slot in unit.slots:
        size = slot.stop - slot.start
        ranges.append((slot.name, (start, start + size), slot.shape))
        start += size
    return ranges


def _finish_rounds(handles: list[_CompressedSum]) -> None:
    """Advance the buckets of a step round by round, so that the collectives of a round overlap; empty the list."""
    unfinished = True
    while unfinished:
        # A list, since any() of a generator would stop at the first bucket that has another round.
        advanced = [handle.rounds.advance() for handle in handles]
        unfinished = any(advanced)
    handles.clear()  # each of them refers to it


class _CompressedSum:
    """The handle of a bucket in flight; ``finish_rounds`` completes the rounds of all buckets."""

    def __init__(
        self, bucket: Bucket, flat: Tensor, rounds: Rounds, factor: float, finish_rounds: Callable[[], None]
    ) -> None:
        self._bucket = bucket
        self._flat = flat
        self.rounds = rounds
        self._factor = factor
        self._finish_rounds = finish_rounds

    def wait(self) -> Tensor:
        """Return the flat sum."""
        self._finish_rounds()
        total = assembled(self._bucket, self.rounds.results, self._flat)
        return total if self._factor == 1.0 else total * self._factor
