"""Closed-form costs of a step: memory of a rank, bytes it hands to collectives, idle share of its pipeline stage.

Parameters, gradients and optimizer: Rajbhandari et al. 2020, section 5, for float32. Activations: ``activations.py``.
The bubble: Narayanan et al. 2021, section 2.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import pluggy

from hvdlm import plugins
from hvdlm.config import Config, ParallelConfig
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.flat_layout import FlatLayout, make_layout
from hvdlm.parallel.layer_units import make_unit_layout
from hvdlm.parallel.level_shards import shard_layout
from hvdlm.parallel.mesh import Mesh
from hvdlm.parallel.muon import MuonLayout, count, names_of
from hvdlm.parallel.sharding_rules import ModelShard, make_model_shard
from hvdlm.planning.activations import Activations
from hvdlm.planning.gathered_layers import gathers_of, held_at_peak, scattered_buckets
from hvdlm.planning.same import Same
from hvdlm.planning.zero_payloads import KNOWN, ZeroPayload, zero_payloads
from hvdlm.protocols.state_dict import OPTIMIZER_STATE, optimizer_state
from hvdlm.protocols.types import Prediction


def state_vectors(manager: pluggy.PluginManager, config: Config) -> int:
    """Return the number of vectors of state that the optimizer keeps, one of a plugin's, too."""
    return len(optimizer_state(config.train, plugins.find_optimizer(manager, config.train)))


def predict_costs(
    manager: pluggy.PluginManager, config: Config, spec: ModelSpec, mesh: Mesh, rank: int
) -> Prediction | None:
    """Return a plugin's prediction of a step of ``rank`` (``hvdlm_predict``), else that of the closed forms here.

    None where neither knows the architecture.
    """
    moments = state_vectors(manager, config)
    prediction = manager.hook.hvdlm_predict(config=config, spec=spec, mesh=mesh, rank=rank, moments=moments)
    return prediction if prediction is not None else closed_form(config, spec, mesh, rank, moments=moments)


@dataclass(frozen=True)
class Habits:
    """What a framework's plugin does in another way than PyTorch's, whose ways are the defaults.

    Attributes:
        recomputes_all: whether activation checkpointing repeats the last collective of a layer's forward pass, too.
        compiles: whether ``train.compile auto`` compiles GPTs on GPUs.
        packs_gradients: whether parameters are copied out of the flat vector and their gradients into buckets, instead
            of lying there.
        gathers_in_graph: whether the edges of a graph bound the memory of ZeRO-3's parameters and gradients.
        gathers_context: whether context ranks gather keys and values, instead of passing them round a ring.
    """

    recomputes_all: bool = False
    compiles: bool = True
    packs_gradients: bool = False
    gathers_in_graph: bool = False
    gathers_context: bool = False


def closed_form(
    config: Config, spec: ModelSpec, mesh: Mesh, rank: int, habits: Habits | None = None, moments: int | None = None
) -> Prediction | None:
    """Return the costs of a step of ``rank``, or None for an architecture other than GPT and recurrent ones.

    ``moments``: state vectors of the optimizer; None: those of a built-in ``train.optimizer``.
    """
    if spec.kind not in ("gpt", "rnn"):
        return None
    if moments is None:
        moments = len(optimizer_state(config.train))
    return Step(config, spec, mesh, rank, habits or Habits(), moments).prediction()


# A search describes thousands of layouts, many of which have the same parameters on a rank.
@lru_cache(maxsize=512)
def _model_shard(spec: Same[ModelSpec], mesh: Mesh, rank: int, sequence: bool, virtual: int) -> ModelShard:
    return make_model_shard(spec.value, mesh, rank, ParallelConfig(sequence=sequence, virtual_stages=virtual))


@lru_cache(maxsize=1024)
def _layout(shard: Same[ModelShard], bucket_bytes: int, align: int) -> FlatLayout:
    return make_layout(shard.value.params, bucket_bytes, align, shard.value.tied)


@lru_cache(maxsize=512)
def _unit_layout(shard: Same[ModelShard], align: int) -> FlatLayout:
    return make_unit_layout(shard.value.params, align)


@lru_cache(maxsize=512)
def _gathered_and_passing(shard: Same[ModelShard], ranks: int, tied: bool, in_graph: bool) -> tuple[int, int]:
    held = held_at_peak(_unit_layout(shard, ranks), ranks, tied, in_graph)
    return held["parameters"], held["gradients"]


@lru_cache(maxsize=2048)
def _partial(shard: Same[ModelShard], prefix: str, few_kv_heads: bool, sequence: bool) -> int:
    of_heads = (".attention.query_norm.", ".attention.key_norm.")
    elements = 0
    for param in shard.value.params:
        name = param.spec.name
        kv = few_kv_heads and (".attention.key." in name or ".attention.value." in name)
        between = sequence and param.shard.extent == param.spec.shape
        if name.startswith(prefix) and (kv or between or any(norm in name for norm in of_heads)):
            elements += param.spec.size
    return elements


class Step:
    """One rank's step: ``rows`` x ``time`` tokens in each of ``count`` micro-batches."""

    def __init__(self, config: Config, spec: ModelSpec, mesh: Mesh, rank: int, habits: Habits, moments: int) -> None:
        self.moments = moments
        self.config = config
        self.habits = habits
        self.spec = spec
        self.s = spec.settings
        self.kind = spec.kind
        self.half = config.train.precision in ("bf16", "fp16")  # auto may be either: fp32, which takes more
        self.item = 2 if self.half else 4  # bytes of an activation that is sent
        self.mesh = mesh
        within, model_ranks = mesh.model_group(rank).index(rank), Mesh(1, mesh.pipeline, mesh.tensor)
        p = config.parallel
        self.shard: ModelShard = _model_shard(Same(spec), model_ranks, within, p.sequence, p.virtual_stages)
        self.replica = mesh.replica_group(rank).index(rank)  # among the ranks that sum gradients
        self.zero = config.parallel.zero if mesh.replicas > 1 else 0
        align = mesh.replicas if self.zero else 1
        if self.zero == 3:
            self.layout: FlatLayout = _unit_layout(Same(self.shard), align)
        else:
            self.layout = _layout(Same(self.shard), config.communication.bucket_bytes, align)
        rows = config.train.batch_size // mesh.data
        self.rows, self.time = config.train.micro_batch_size or rows, config.data.context // mesh.context
        self.count = rows // self.rows
        self.tokens = self.rows * self.time
        self.sequence = self.shard.sequence and self.time % mesh.tensor == 0

    @property
    def tied(self) -> bool:
        """Whether the head's table is the embedding's."""
        return bool(getattr(self.s, "tie_embeddings", False))

    def unpacked_bytes(self) -> float:
        """Return the bytes per element of cutting parameters out of the flat vector, of one forward pass."""
        return 8.0 if self.habits.packs_gradients else 0.0

    def gradient_bytes(self) -> float:
        """Return the bytes per element of adding up gradients, of one backward pass, in float32."""
        if not self.habits.packs_gradients:
            return 12.0  # the new one and the sum are read, the sum is written
        if self.mesh.pipeline > 1:
            return 20.0  # copied into one vector, which is added
        return 28.0 if self.sums_micro_batches else 8.0  # copied into buckets; these into one vector, which is added

    @property
    def sums_micro_batches(self) -> bool:
        """Whether a framework that packs gradients keeps a vector of sums."""
        several = self.config.train.micro_batch_size is not None or self.mesh.pipeline > 1
        return self.habits.packs_gradients and several

    def prediction(self) -> Prediction:
        """Return all costs."""
        stages, virtual = self.mesh.pipeline, self.config.parallel.virtual_stages
        return Prediction(
            memory=self.memory(),
            bytes=self.bytes() if self.has_known_bytes() else None,
            idle_share=idle_share(stages, self.count, virtual) if stages > 1 else 0.0,
            layers=tuple(bound for chunk in self.shard.stage.chunks for bound in chunk),
            micro_batches=self.count,
        )

    def has_known_bytes(self) -> bool:
        """Return whether gradients are summed whole at every step, or with ZeRO by a built-in compressor."""
        c = self.config.communication
        known = ("none", *KNOWN) if self.zero else ("none",)
        whole = c.exchange == "all_reduce" and c.reduction not in ("adasum", "exact")
        return whole and c.compression.algorithm in known

    def memory(self) -> dict[str, int]:
        """Return bytes of parameters, gradients, optimizer and activations."""
        size = self.layout.size
        zero_shard = size // self.mesh.replicas
        if self.zero == 3:
            in_graph = self.habits.gathers_in_graph
            gathered, passing = _gathered_and_passing(Same(self.shard), self.mesh.replicas, self.tied, in_graph)
            return {
                "parameters": 4 * zero_shard + gathered + self.spec.frozen_bytes,
                "gradients": 4 * zero_shard + passing,
                "optimizer": 4 * self.optimizer_elements(zero_shard),
                "activations": Activations(self).bytes(),
            }
        buckets = [self.layout.bucket_range(i) for i in range(len(self.layout.buckets))]
        # While one bucket is sent, the next one is filled.
        passing = max(b - a for (a, _), (_, b) in zip(buckets, [*buckets[1:], buckets[-1]], strict=True))
        gradients = {0: size, 1: size + zero_shard, 2: zero_shard + passing}[self.zero]
        if self.config.communication.reduction == "exact":  # sums that wait for others, as in a binary counter
            gradients += max(0, (self.count - 1).bit_length() - 1) * size
        return {
            "parameters": 4 * (size + (zero_shard if self.zero else 0)) + self.spec.frozen_bytes,
            "gradients": 4 * gradients,
            "optimizer": 4 * self.optimizer_elements(zero_shard if self.zero else size),
            "activations": Activations(self).bytes(),
        }

    def optimizer_elements(self, updated: int) -> int:
        """Return the elements of the optimizer's state, and of the average, on a rank that updates ``updated`` ones."""
        average = updated if self.config.train.ema is not None else 0
        if self.muon is None:
            return self.moments * updated + average
        return average + sum(count(self.muon.state_elements(kind)) for kind in OPTIMIZER_STATE["muon"])

    @cached_property
    def muon(self) -> MuonLayout | None:
        """Which rule updates which elements, with the optimizer muon; None with others."""
        names = names_of(self.spec, self.config.train)
        if not names:
            return None
        shards = self.mesh.replicas if self.zero else 1
        return MuonLayout(self.layout, names, self.replica if self.zero else 0, shards, self.mesh.tensor)

    def gathered_momentum(self) -> list[int]:
        """Return the elements of the gathers of Muon's momentum over data ranks (ZeRO), of all ranks together."""
        if self.muon is None or not self.zero:
            return []
        ends = [self.layout.bucket_range(index) for index in self.muon.buckets]
        return [stop - start for start, stop in ends]

    def sharded_momentum(self) -> int:
        """Return the elements of Muon's momentum that this rank hands to the tensor ranks' gather."""
        return sum(matrix.slot.stop - matrix.slot.start for matrix in self.muon.sharded) if self.muon else 0

    def bytes(self) -> dict[str, int]:
        """Return the bytes that a step hands to collectives, by axis."""
        totals = {"data": self.on_data(), "model": 0, "tensor": self.on_tensor(), "pipeline": self.on_pipeline()}
        totals["node"], totals["context"] = self.on_node(), self.on_context()
        if self.mesh.tensor * self.mesh.pipeline > 1:
            totals["model"] = 3 * 8  # loss, tokens and squared norm in float64
        return {axis: count for axis, count in totals.items() if count}

    def on_data(self) -> int:
        """Return the bytes of gradients and metrics; with ZeRO, gradients once or per micro-batch, and parameters.

        ZeRO-3 gathers parameters in every micro-batch, most of them twice.
        """
        if self.mesh.replicas == 1:
            return 0
        whole = 4 * (self.level_shards.size if self.mesh.has_levels else self.layout.size)
        if not self.zero:
            return whole + 2 * 8
        sent = self.zero_payloads
        if self.zero == 3:
            scattered = sum(sent[index].gradients for index in scattered_buckets(self.layout, self.tied))
            gathered = sum(4 * unit.size * sum(times) for unit, times in gathers_of(self.layout, self.tied))
            return self.count * (scattered + gathered // self.mesh.replicas) + 3 * 8
        gradients = sum(bucket.gradients + bucket.rest for bucket in sent) * (self.count if self.zero == 2 else 1)
        momentum = 4 * sum(self.gathered_momentum()) // self.mesh.replicas
        return gradients + sum(bucket.parameters[self.replica] for bucket in sent) + momentum + 3 * 8

    def on_node(self) -> int:
        """Return the bytes within a node of sums in two levels: a rank scatters buckets and gathers shards."""
        if not self.mesh.has_levels:
            return 0
        return 4 * self.level_shards.size * (self.mesh.data_per_node + 1)

    @cached_property
    def level_shards(self) -> FlatLayout:
        """The layout of this rank's shards of buckets in sums in two levels."""
        per_node = self.mesh.data_per_node
        return shard_layout(self.layout, self.replica % per_node, per_node)

    @cached_property
    def zero_payloads(self) -> list[ZeroPayload]:
        """What a rank hands over of every bucket with ZeRO."""
        return zero_payloads(self.config, self.layout, self.mesh.replicas)

    def on_pipeline(self) -> int:
        """Return the bytes of activations and their gradients, to and from neighbours, and of tied gradients."""
        stage = self.shard.stage
        if stage.count == 1:
            return 0
        positions = self.tokens // self.mesh.tensor if self.sequence else self.tokens
        neighbours = sum((not c.stage.first) + (not c.stage.last) for c in self.shard.chunks)
        moved = self.count * neighbours * 2 * self.item * positions * self.s.width
        if self.shard.tied and (stage.first or stage.last):
            names = [self.layout.slots[first].name for first, _ in self.layout.buckets]
            start, stop = self.layout.bucket_range(names.index(self.shard.tied[0]))
            moved += 4 * (stop - start) // (self.mesh.replicas if self.zero else 1)
        return moved

    def on_context(self) -> int:
        """Return the bytes of keys, values and their float32 gradients.

        In a ring, to the next rank and from the one before: each block of them comes to every other context rank, in
        the backward pass again, then with its gradients. Else blocks are gathered, and the gradients of all scattered.
        """
        ranks = self.mesh.context
        if ranks == 1:
            return 0
        block = 2 * self.tokens * self.s.head_width * max(1, self.s.kv_heads // self.mesh.tensor)
        passes = 3 if self.config.train.activation_checkpointing else 2  # forward, again, and backward
        moved = block * (passes * self.item + 4 * ranks)
        if not self.habits.gathers_context:
            moved = 2 * (ranks - 1) * block * (passes * self.item + 4)
        return self.count * len(self.shard.layers) * moved

    def on_tensor(self) -> int:
        """Return the bytes of tensor parallelism in all micro-batches, and of Muon's momentum."""
        if self.mesh.tensor == 1:
            return 0
        each = self.gpt_tensor_bytes() if self.kind == "gpt" else self.rnn_tensor_bytes()
        return self.count * each + 4 * self.sharded_momentum()

    def gpt_tensor_bytes(self) -> int:
        """With ``x`` all tokens' states: f and g sum ``x``; sharded positions scatter ``x`` and gather its shard."""
        stage, layers = self.shard.stage, len(self.shard.layers)
        x = self.item * self.tokens * self.s.width
        both = x + x // self.mesh.tensor if self.sequence else x  # g or f, forward and backward together
        recomputed = 0
        if self.config.train.activation_checkpointing:
            # The forward collectives of a layer once more, with or without the last of them.
            sums = 2 if self.habits.recomputes_all else 1
            recomputed = sums * x + (2 * (x // self.mesh.tensor) if self.sequence else 0)
        total = layers * (4 * both + recomputed + 4 * self.partial("layers."))
        if stage.first:
            total += both + 4 * self.partial("embed.positions")
        if stage.last:
            total += both + 4 * self.partial("final_norm.") + self.loss_bytes()
        return total

    def partial(self, prefix: str) -> int:
        """Return the elements of one layer's parameters that all ranks hold and whose gradients are summed."""
        prefix = f"layers.{self.shard.layers[0]}." if prefix == "layers." else prefix
        return _partial(Same(self.shard), prefix, self.s.kv_heads % self.mesh.tensor > 0, self.sequence)

    def rnn_tensor_bytes(self) -> int:
        """Return the bytes of hidden units after every time step and their gradients, the embedding, the loss."""
        stage, layers = self.shard.stage, len(self.shard.layers)
        state = self.item * self.rows * self.s.width
        gathers = self.time + 1
        if self.config.train.activation_checkpointing:
            gathers += self.time + self.habits.recomputes_all
        total = layers * (gathers * (state // self.mesh.tensor) + self.time * state)
        total += 2 * self.item * self.tokens * self.s.width if stage.first else 0
        return total + (self.loss_bytes() if stage.last else 0)

    def loss_bytes(self) -> int:
        """Return the bytes of the figures of every target that ranks with a part of its scores gather."""
        return 4 * self.tokens * (4 if self.config.train.label_smoothing else 3)


def idle_share(stages: int, micro_batches: int, virtual: int = 1) -> float:
    """Return the fraction of a step in which a stage waits: (p - 1) / (v m + p - 1) (Narayanan et al. 2021, 2.2).

    The paper relates the bubble to the ideal time, (p - 1) / (v m); here it is related to the duration of a step.
    ``virtual``: v, the virtual stages of a rank.
    """
    return (stages - 1) / (virtual * micro_batches + stages - 1)
