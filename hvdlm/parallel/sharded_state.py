"""A rank's shard of the training state: flat vectors as arrays under global names, and back."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.flat_layout import Elements, Shard, Slot, make_layout, whole
from hvdlm.parallel.layer_units import make_unit_layout
from hvdlm.parallel.mesh import Mesh
from hvdlm.parallel.moving_average import KIND as AVERAGE
from hvdlm.parallel.muon import MuonLayout
from hvdlm.parallel.muon import names_of as muon_names
from hvdlm.parallel.parameter_groups import ParameterGroups, UpdateRates
from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm.protocols.exchange import Exchange
from hvdlm.protocols.state_dict import FIRST_STEP, OPTIMIZER_STATE
from hvdlm.training.loss_scale import LossScale

OWN_PARAMETERS = "exchange/own/parameters"
"""Prefix of a rank's own parameters, saved while ranks differ; on another number of ranks it has none."""


class FlatState:
    """The names and shards of a vector that consists of elements of slots, such as the flat one or its ZeRO shard.

    ``slots``: each with the start of its elements in the vector, and which of the slot's these are.
    """

    def __init__(self, slots: Sequence[Elements]) -> None:
        self._slots = slots

    def arrays(self, flat: np.ndarray, prefix: str) -> dict[str, np.ndarray]:
        """Return {prefix/name: array}, copies of the slots of ``flat``."""
        return {
            f"{prefix}/{slot.name}": flat[start : start + b - a].reshape(_shard(slot, a, b).held).copy()
            for slot, start, (a, b) in self._slots
        }

    def shards(self, prefix: str) -> dict[str, Shard]:
        """Return {prefix/name: its shard of the global array}."""
        return {f"{prefix}/{slot.name}": _shard(slot, a, b) for slot, _, (a, b) in self._slots}

    def restored(self, flat: np.ndarray, prefix: str, state: Mapping[str, np.ndarray], required: bool) -> np.ndarray:
        """Return a copy of ``flat`` with the arrays of ``state``; missing ones stay, unless they are ``required``.

        Raises:
            HvdlmError: an array is missing or has another shape.
        """
        flat = flat.copy()
        for slot, start, (a, b) in self._slots:
            array, expected = state.get(f"{prefix}/{slot.name}"), _shard(slot, a, b).held
            if array is None and not required:
                continue
            if array is None or array.shape != expected:
                problem = "is missing" if array is None else f"has shape {list(array.shape)}"
                raise HvdlmError(
                    f"the checkpoint doesn't fit the model: {prefix}/{slot.name} {problem}, expected {list(expected)}. "
                    "Use the model settings it was trained with (RUN/config.yaml)."
                )
            flat[start : start + b - a] = array.reshape(-1)
        return flat


def _shard(slot: Slot, first: int, last: int) -> Shard:
    """Return the shard of elements ``first:last`` of a slot."""
    if (first, last) == (0, slot.stop - slot.start):
        return slot.shard
    return Shard(slot.shard.shape, slot.shard.start, slot.shard.extent, (first, last))


class ShardedState:
    """The framework-independent part of a Trainable: its layout, shards and state; a framework adds the computation.

    Attributes:
        layout: the slots of parameters in the flat vector ``[size]``.
        update_ranges: what this rank updates of it, (start, stop) for every bucket: all, or its ZeRO shard.
        shard_ranges: the same ranges as (start, stop) in their concatenation, the vector that this rank updates.
        first_step: the step in whose update the optimizer's state was zero, see ``FIRST_STEP``.
        muon: which rule updates which elements, with the optimizer muon; None with others.
        norm_ranges: the (start, stop) in that vector that this rank counts towards the gradient norm.
        tied_buckets: the buckets that two stages hold.
    """

    def __init__(
        self, spec: ModelSpec, model_shard: ModelShard, exchange: Exchange, config: Config, mesh: Mesh, rank: int
    ) -> None:
        self.spec = spec
        self.model_shard = model_shard
        self.exchange = exchange
        self.config = config
        self.mesh = mesh
        self.coordinates = mesh.coordinates(rank)
        zero_rank, zero_size = exchange.traits.zero_rank, exchange.traits.zero_size
        if exchange.traits.shards_parameters:
            self.layout = make_unit_layout(model_shard.params, zero_size)
        else:
            self.layout = make_layout(
                model_shard.params, config.communication.bucket_bytes, align=zero_size, alone=model_shard.tied
            )
        self.update_ranges = self.layout.zero_ranges(zero_rank, zero_size)
        ends = np.cumsum([b - a for a, b in self.update_ranges]).tolist()
        self.shard_ranges = list(zip([0, *ends[:-1]], ends, strict=True))
        self.norm_ranges = self.layout.counted_runs(zero_rank, zero_size)
        first_names = [self.layout.slots[first].name for first, _ in self.layout.buckets]
        self.tied_buckets = [index for index, name in enumerate(first_names) if name in model_shard.tied]
        self.first_step = 0
        self.loss_scale = LossScale(config.train.precision)
        self._elements = self.layout.zero_slots(zero_rank, zero_size)
        self._memory = FlatState(self._elements)
        saves_shard = exchange.traits.rounds_parameters or exchange.traits.shards_parameters
        self._weights = self._memory if saves_shard else FlatState(self.layout.zero_slots(0, 1))
        self.muon: MuonLayout | None = None
        self._memories: dict[str, FlatState] = {}  # by kind, where the optimizer keeps some for some parameters only
        if names := muon_names(spec, config.train):
            self.muon = MuonLayout(self.layout, names, zero_rank, zero_size, mesh.tensor)
            for kind in OPTIMIZER_STATE["muon"]:
                self._memories[kind] = FlatState(self.muon.state_elements(kind))
        self._identities: dict[tuple[bool, tuple[str, ...]], dict[str, str]] = {}

    @property
    def loss_divisor(self) -> float:
        """Divisor of a micro-batch's loss sum before the backward pass: the targets of a full global batch."""
        return float(self.config.train.batch_size * self.config.data.context)

    def initial(self) -> np.ndarray:
        """Return the flat vector's initial values, float32 ``[size]``."""
        seed = self.config.train.seed
        return self.layout.flatten(
            {p.spec.name: p.spec.initial_box(seed, p.shard.slices) for p in self.model_shard.params}
        )

    def initial_shard(self) -> np.ndarray:
        """Return ``update_shard`` of the initial values, without ever holding more than one parameter's besides."""
        boxes = {p.spec.name: p for p in self.model_shard.params}
        flat = np.zeros(self.shard_ranges[-1][1], np.float32)
        for slot, start, (low, high) in self._elements:
            param = boxes[slot.name]
            values = param.spec.initial_box(self.config.train.seed, param.shard.slices)
            flat[start : start + high - low] = values.reshape(-1)[low:high]
        return flat

    def initial_frozen(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the name and the float32 values of every frozen base weight."""
        for param in self.spec.frozen:
            yield param.name, param.initial_box(self.config.train.seed, whole(param.shape).slices)

    def update_shard(self, flat: np.ndarray) -> np.ndarray:
        """Return the elements of ``flat`` ``[size]`` that this rank updates, concatenated."""
        return np.concatenate([flat[a:b] for a, b in self.update_ranges])

    def update_rates(self) -> UpdateRates:
        """Return the weight decay and the factor of the learning rate of every element of ``update_shard``."""
        groups = ParameterGroups(self.config.train)
        decays = self._filled(lambda slot: groups.weight_decay(slot.name, slot.decay))
        if not groups.scaled:
            return UpdateRates(decays)
        return UpdateRates(decays, self._filled(lambda slot: groups.learning_rate_scale(slot.name)))

    def _filled(self, value: Callable[[Slot], float]) -> np.ndarray:
        """Return float32: ``value(slot)`` in every element of ``update_shard``, 0 between slots."""
        flat = np.zeros(self.shard_ranges[-1][1], np.float32)
        for slot, start, (low, high) in self._elements:
            flat[start : start + high - low] = value(slot)
        return flat

    def seed(self, step: int, *keys: int, row: int | None = None) -> np.random.SeedSequence:
        """Return a dropout seed, different for data and context ranks, stages, steps (and ``keys``: the micro-batch).

        ``row`` of the global batch takes the data rank's place in exact sums. Tensor ranks compute the same values
        outside of the matrix products, so they have the same seed, unless they shard the positions.
        """
        position = [
            self.coordinates["data"] if row is None else row,
            self.coordinates["pipeline"],
            self.model_shard.index * self.model_shard.sequence,
        ]
        # Without pipeline, context and sequence parallelism the data rank alone, so that layouts keep their seeds.
        if context := self.coordinates["context"]:  # other positions of the same rows
            position.append(context)
        position = position if any(position[1:]) else position[:1]
        return np.random.SeedSequence([self.config.train.seed, *position, step, *keys])

    def arrays(self, flat: np.ndarray, memory: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return ``Trainable.state`` but the recurrent state, from what is saved of the flat vector and of memory."""
        state = self._weights.arrays(flat, "parameters")
        for kind, array in memory.items():
            state |= self._memory_of(kind).arrays(array, f"optimizer/{kind}")
            if self.exchange.traits.replicas_diverge:
                state |= self._memory_of(kind).arrays(array, f"exchange/own/{kind}")
        if self.exchange.traits.replicas_diverge and not self.exchange.agreed:
            state |= self._weights.arrays(flat, OWN_PARAMETERS)
        if self.loss_scale.active:
            state["optimizer/loss_scale"] = self.loss_scale.state()
        if self.first_step:
            state[FIRST_STEP] = np.array(self.first_step, np.float64)
        return state | {f"exchange/{n}": a for n, a in self.exchange.state().items()}

    def _memory_of(self, kind: str) -> FlatState:
        """Return the names and shards of the optimizer's state ``kind``."""
        return self._memories.get(kind, self._memory)

    def fingerprints(self, flat: np.ndarray) -> dict[str, int]:
        """Return ``Trainable.fingerprints`` of the flat vector ``[size]``."""
        traits = self.exchange.traits
        if traits.shards_parameters or (traits.replicas_diverge and not self.exchange.agreed):
            return {}
        return {slot.name: zlib.crc32(flat[slot.start : slot.stop].data) for slot in self.layout.slots}

    def replicas(self, names: Collection[str], memory: Mapping[str, Any]) -> dict[str, str]:
        """Return ``Trainable.replicas``; every save asks for them, and they are computed once."""
        known = self.exchange.agreed, tuple(names)
        if known not in self._identities:
            self._identities[known] = self._identify(names, memory)
        return self._identities[known]

    def _identify(self, names: Collection[str], memory: Mapping[str, Any]) -> dict[str, str]:
        """Return identities by the shard, and where ranks differ, by their coordinates."""
        exchange, traits, shards = self.exchange, self.exchange.traits, self.shards(memory)
        # Compression of a bucket depends on all of its contents, so that what several tensor ranks hold drifts apart.
        lossy = self.config.communication.compression.algorithm != "none" or traits.rounds_parameters
        identities = {}
        for name in names:
            replicated = name.startswith("exchange/") and name.removeprefix("exchange/").startswith(
                exchange.traits.replicated
            )
            if name.startswith("exchange/") and not replicated:
                continue
            independent = traits.replicas_diverge and not replicated
            independent = independent and not (exchange.agreed and name.startswith("parameters/"))
            axes = ["data"] * independent + ["pipeline", "tensor"] * (lossy or replicated)
            identities[name] = repr((shards.get(name), [self.coordinates[axis] for axis in axes]))
        return identities | {f"frozen/{param.name}": "" for param in self.spec.frozen}

    def shards(self, memory: Mapping[str, Any]) -> dict[str, Shard]:
        """Return ``Trainable.shards``; ``memory``: the optimizer's state, by kind."""
        shards = self._weights.shards("parameters")
        for kind in memory:
            shards |= self._memory_of(kind).shards(f"optimizer/{kind}")
        return shards | self._carry_shards()

    def _carry_shards(self) -> dict[str, Shard]:
        """Return the shards of a recurrent model's state ``[batch_size, hidden]``."""
        settings, batch = self.spec.settings, self.config.train.batch_size
        if not hasattr(settings, "carries"):
            return {}
        rows, (first, last) = batch // self.mesh.data, self.model_shard.range_of(settings.width)
        shard = Shard((batch, settings.width), (self.coordinates["data"] * rows, first), (rows, last - first))
        return {f"carry/{i}.{j}": shard for i in self.model_shard.layers for j in range(settings.carries)}

    def updates(self, step: int) -> int:
        """Return the number of the update of ``step`` (from 0) since the optimizer's state was zero."""
        return step - self.first_step

    def restore(
        self, state: Mapping[str, np.ndarray], flat: np.ndarray, memory: Mapping[str, np.ndarray]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return this rank's parameters and optimizer memory in ``state``; restore all else from it."""
        self.first_step = int(state.get(FIRST_STEP, 0))
        flat = self._weights.restored(flat, "parameters", state, required=True)
        restored = {}
        for kind, array in memory.items():
            names = self._memory_of(kind)
            if kind == AVERAGE:  # starts from the parameters where the checkpoint has none
                array = flat if self.exchange.traits.rounds_parameters else self.update_shard(flat)
            restored[kind] = names.restored(array, f"optimizer/{kind}", state, required=False)
            restored[kind] = names.restored(restored[kind], f"exchange/own/{kind}", state, required=False)
        if self.loss_scale.active and "optimizer/loss_scale" in state:
            self.loss_scale.load_state(state["optimizer/loss_scale"])
        self.exchange.open(self.layout, flat)
        self.exchange.load_state(
            {k.removeprefix("exchange/"): v for k, v in state.items() if k.startswith("exchange/")}
        )
        return self._weights.restored(flat, OWN_PARAMETERS, state, required=False), restored


def recurrent_state(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a recurrent model's entries of ``state``, by layer."""
    return {k.removeprefix("carry/"): v for k, v in state.items() if k.startswith("carry/")}


def recurrent_entries(micro_batches: list[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return the state entries of a recurrent model from the states of all micro-batches, in their order."""
    names = micro_batches[0] if micro_batches else ()
    return {f"carry/{name}": np.concatenate([states[name] for states in micro_batches]) for name in names}
