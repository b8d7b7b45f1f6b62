"""What a rank keeps of a training's state, under global names: flat vectors as arrays, and back."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.flat_layout import FlatLayout, Shard, Slot, make_layout, whole
from hvdlm.parallel.mesh import Mesh
from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm.protocols.exchange import Exchange
from hvdlm.training.loss_scale import LossScale


class FlatState:
    """The names and pieces of flat vectors ``[size]``, or ``[size / parts]`` where ``parts`` ranks share one (ZeRO)."""

    def __init__(self, layout: FlatLayout, part: int = 0, parts: int = 1) -> None:
        every = [(slot, slot.start, (0, slot.stop - slot.start)) for slot in layout.slots]
        self._places = layout.zero_slots(part, parts) if parts > 1 else every

    def arrays(self, flat: np.ndarray, prefix: str) -> dict[str, np.ndarray]:
        """Return {prefix/name: array} as copies of the parts of ``flat``."""
        return {
            f"{prefix}/{slot.name}": flat[start : start + b - a].reshape(_shard(slot, a, b).held).copy()
            for slot, start, (a, b) in self._places
        }

    def shards(self, prefix: str) -> dict[str, Shard]:
        """Return {prefix/name: which piece of the global array it is}."""
        return {f"{prefix}/{slot.name}": _shard(slot, a, b) for slot, _, (a, b) in self._places}

    def take(self, flat: np.ndarray, prefix: str, state: Mapping[str, np.ndarray], required: bool) -> np.ndarray:
        """Return ``flat`` with the arrays of ``state``; those that are missing stay, unless they are ``required``.

        Raises:
            HvdlmError: an array is missing or has another shape.
        """
        flat = flat.copy()
        for slot, start, (a, b) in self._places:
            array, expected = state.get(f"{prefix}/{slot.name}"), _shard(slot, a, b).held
            if array is None and not required:
                continue
            if array is None or array.shape != expected:
                found = "is missing" if array is None else f"has shape {list(array.shape)}"
                raise HvdlmError(
                    f"the checkpoint doesn't fit the model: {prefix}/{slot.name} {found}, expected {list(expected)}. "
                    "Use the model settings it was trained with (RUN/config.yaml)."
                )
            flat[start : start + b - a] = array.reshape(-1)
        return flat


def _shard(slot: Slot, first: int, last: int) -> Shard:
    """Return elements ``first:last`` of what ``slot`` holds."""
    if (first, last) == (0, slot.stop - slot.start):
        return slot.shard
    return Shard(slot.shard.shape, slot.shard.start, slot.shard.extent, (first, last))


class ShardedState:
    """What every framework's Trainable is made of on its rank, and its state; a framework adds how it computes.

    Attributes:
        layout: where parameters lie in the flat vector ``[size]``.
        ranges: what this rank updates of it, (start, stop) for every bucket: all, or its part (ZeRO).
        places: where each of them lies in the vector of what this rank updates, (start, stop).
        counted: the (start, stop) there that count for the gradient's norm on this rank.
        tied: the buckets that two stages hold.
    """

    def __init__(
        self, spec: ModelSpec, model_shard: ModelShard, exchange: Exchange, config: Config, mesh: Mesh, rank: int
    ) -> None:
        self.spec, self.model_shard, self.exchange, self.config, self.mesh = spec, model_shard, exchange, config, mesh
        self.at = mesh.coordinates(rank)
        part, parts = exchange.zero_rank, exchange.zero_size
        self.layout = make_layout(model_shard.params, config.communication.bucket_bytes, parts, model_shard.tied)
        self.ranges = self.layout.zero_ranges(part, parts)
        ends = np.cumsum([b - a for a, b in self.ranges]).tolist()
        self.places = list(zip([0, *ends[:-1]], ends, strict=True))
        self.counted = self.layout.counted_runs(part, parts)
        firsts = [self.layout.slots[first].name for first, _ in self.layout.buckets]
        self.tied = [index for index, name in enumerate(firsts) if name in model_shard.tied]
        self.loss_scale = LossScale(config.train.precision)
        self._weights, self._memory = FlatState(self.layout), FlatState(self.layout, part, parts)

    @property
    def normaliser(self) -> float:
        """What a micro-batch's sum of losses is divided by before the backward pass: the global batch's tokens."""
        return float(self.config.train.batch_size * self.config.data.context)

    def initial(self) -> np.ndarray:
        """Return the flat vector's initial values, float32 ``[size]``."""
        seed = self.config.train.seed
        return self.layout.flatten(
            {p.spec.name: p.spec.initial_box(seed, p.shard.slices) for p in self.model_shard.params}
        )

    def frozen(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the name and the float32 values of every parameter that adapters are trained in place of."""
        for param in self.spec.frozen:
            yield param.name, param.initial_box(self.config.train.seed, whole(param.shape).slices)

    def own(self, flat: np.ndarray) -> np.ndarray:
        """Return what this rank updates of ``flat`` ``[size]``, laid end to end."""
        return np.concatenate([flat[a:b] for a, b in self.ranges])

    def seed(self, step: int, *more: int) -> np.random.SeedSequence:
        """Return a seed for dropout: of its own for every data rank, stage and step.

        Tensor ranks compute the same outside of the matrix products, and share it, unless they share the positions.
        """
        place = [self.at["data"], self.at["pipeline"], self.model_shard.place * self.model_shard.sequence]
        return np.random.SeedSequence([self.config.train.seed, *(place if any(place[1:]) else place[:1]), step, *more])

    def arrays(self, flat: np.ndarray, memory: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return ``Trainable.state`` but for what is carried, from the parameters and the optimizer's memory."""
        state = self._weights.arrays(flat, "parameters")
        for kind, array in memory.items():
            state |= self._memory.arrays(array, f"optimizer/{kind}")
            if self.exchange.apart:
                state |= self._memory.arrays(array, f"exchange/own/{kind}")
        if self.loss_scale.active:
            state["optimizer/loss_scale"] = self.loss_scale.state()
        return state | {f"exchange/{n}": a for n, a in self.exchange.state().items()}

    def fingerprints(self, flat: np.ndarray) -> dict[str, int]:
        """Return ``Trainable.fingerprints`` of the flat vector ``[size]``."""
        if self.exchange.apart and not self.exchange.agreed:
            return {}
        return {slot.name: zlib.crc32(flat[slot.start : slot.stop].data) for slot in self.layout.slots}

    def shards(self, memory: Mapping[str, Any]) -> dict[str, Shard]:
        """Return ``Trainable.pieces``; ``memory``: what the optimizer remembers, by kind."""
        found = self._weights.shards("parameters")
        for kind in memory:
            found |= self._memory.shards(f"optimizer/{kind}")
        return found | self._carried()

    def _carried(self) -> dict[str, Shard]:
        """Return the pieces of a recurrent model's state ``[batch_size, hidden]``."""
        settings, batch = self.spec.settings, self.config.train.batch_size
        if not hasattr(settings, "carries"):
            return {}
        rows, (first, last) = batch // self.mesh.data, self.model_shard.range_of(settings.width)
        shard = Shard((batch, settings.width), (self.at["data"] * rows, first), (rows, last - first))
        return {f"carry/{i}.{j}": shard for i in self.model_shard.layers for j in range(settings.carries)}

    def take(
        self, state: Mapping[str, np.ndarray], flat: np.ndarray, memory: Mapping[str, np.ndarray]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return the parameters and the optimizer's memory of ``state``, and have the exchange go on from it."""
        flat = self._weights.take(flat, "parameters", state, required=True)
        taken = {}
        for kind, array in memory.items():
            taken[kind] = self._memory.take(array, f"optimizer/{kind}", state, required=False)
            taken[kind] = self._memory.take(taken[kind], f"exchange/own/{kind}", state, required=False)
        if self.loss_scale.active and "optimizer/loss_scale" in state:
            self.loss_scale.load_state(state["optimizer/loss_scale"])
        self.exchange.open(self.layout, flat)
        self.exchange.load_state({k[9:]: v for k, v in state.items() if k.startswith("exchange/")})
        return flat, taken


def carried(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return what ``state`` carries of a recurrent model, by layer."""
    return {k[6:]: v for k, v in state.items() if k.startswith("carry/")}


def joined(parts: list[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return the state entries of what all micro-batches carry, ``parts`` in their order."""
    return {f"carry/{name}": np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else ())}
