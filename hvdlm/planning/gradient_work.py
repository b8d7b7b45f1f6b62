"""The work of gradients: buckets and their collectives by exchange and compressor, the update, saves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from hvdlm.config import CommunicationConfig, Config
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.flat_layout import Slot
from hvdlm.parallel.layer_units import EMBEDDING, HEAD
from hvdlm.parallel.mesh import Mesh
from hvdlm.parallel.muon import ITERATIONS, MuonLayout, count
from hvdlm.planning.closed_forms import Habits, Step
from hvdlm.planning.gathered_layers import gathers_of, scattered_buckets
from hvdlm.planning.model_work import segments_of
from hvdlm.planning.payloads import HALF_PRECISION, UNBIASED, is_compressible, payload
from hvdlm.planning.work import Bucket, Collective, Pass, Product, Segment, Work
from hvdlm.protocols.state_dict import optimizer_state

LOCAL_EXCHANGES = ("local_sgd", "diloco", "streaming_diloco")
"""Exchanges whose ranks train independently between synchronisations."""

KNOWN_EXCHANGES = ("all_reduce", *LOCAL_EXCHANGES)
"""Exchanges whose collectives are known."""

# The momentum, and what else they keep; see their modules.
_UPDATE_EXCHANGES = {"one_bit_adam": 6, "zero_one_adam": 9, "demo": 2}  # with copies, but of 0/1 Adam's anchor
_FEEDING_BACK = {"none": 0, "dgc": 2, "chunked_top_k": 1}  # vectors of compressors with a feedback of their own

# Of Muon, per element: gradient, momentum and parameter read and written, and a copy of the momentum in each of 5
# iterations.
_BYTES_OF_MATRICES = 4.0 * (2 * 3 + 2 * 5)


def kept_vectors(options: CommunicationConfig) -> int:
    """Return the flat float32 vectors that an exchange keeps of its own; 0 where sums are all it needs.

    Compressors keep the error feedback, of gradients also as it was before the step; an exchange of parameter
    differences the global parameters and the outer momentum, too.
    """
    algorithm, feedback = options.compression.algorithm, options.compression.error_feedback
    has_feedback = algorithm not in UNBIASED if feedback is None else feedback
    compressor = _FEEDING_BACK.get(algorithm, int(has_feedback))
    if options.exchange not in LOCAL_EXCHANGES:
        return _UPDATE_EXCHANGES.get(options.exchange, 2 * compressor)
    momentum = options.local.outer_momentum
    has_momentum = options.exchange != "local_sgd" if momentum is None else momentum > 0
    return 1 + has_momentum + compressor


def kept_bytes(config: Config, mesh: Mesh, parameters: float) -> float:
    """Return the bytes of ``kept_vectors`` on a rank that holds ``parameters`` bytes of them, with ZeRO's shard."""
    of_one = parameters
    if mesh.has_levels:  # of the shards that are summed between nodes
        of_one /= mesh.data_per_node
    elif config.parallel.zero and mesh.replicas > 1:
        of_one *= mesh.replicas / (mesh.replicas + 1)
    return kept_vectors(config.communication) * of_one


def work_of(
    config: Config,
    spec: ModelSpec,
    mesh: Mesh,
    rank: int,
    habits: Habits | None = None,
    moments: int | None = None,
    fused: bool = False,
) -> Work | None:
    """Return the work of a step of ``rank``, or None for an architecture other than GPT and recurrent ones.

    Between data ranks, it is None for an exchange of which nothing is known, too, and for context ranks, whose
    attention was not measured.

    ``moments``: as in ``closed_form``. ``fused``: whether element-wise operations are compiled.
    """
    if spec.kind not in ("gpt", "rnn") or (mesh.data > 1 and config.communication.exchange not in KNOWN_EXCHANGES):
        return None
    if mesh.context > 1:
        return None
    moments = len(optimizer_state(config.train)) if moments is None else moments
    step = Step(config, spec, mesh, rank, habits or Habits(), moments)
    segments = _gathering(step, segments_of(step, fused))
    exchange = _Exchange(step, segments)
    size = float(step.layout.size)
    updated = size / mesh.data if step.zero else size
    matrices = float(count(step.muon.owned)) if step.muon else 0.0
    sent = float(step.item * step.tokens * step.s.width) / (mesh.tensor if step.sequence else 1)
    every = config.checkpoint.every
    return Work(
        segments,
        micro_batches=step.count,
        tokens=float(step.tokens),
        buckets=exchange.buckets(),
        scatters_every=step.zero >= 2,
        update_elements=updated - matrices,
        moments=2 if step.muon else moments,
        update_products=newton_schulz(step.muon) if step.muon else (),
        # Zeroing, the norm, the moving average; with ZeRO the copy of gathered parameters; the copy of sums of
        # micro-batches.
        update_bytes=4.0 * (updated if step.zero == 3 else size)
        + 4.0 * updated
        + (12.0 * updated if config.train.ema is not None else 0.0)
        + _BYTES_OF_MATRICES * matrices
        + ((20.0 if step.habits.packs_gradients else 12.0) * size if step.zero in (1, 2) else 0.0)
        + (12.0 * size if step.sums_micro_batches else 0.0),
        after=exchange.after(),
        rounds=exchange.rounds(),
        rounds_bytes=12.0 * size / config.communication.local.steps if exchange.local else 0.0,
        rounds_share=1.0 / config.communication.local.steps if exchange.local else 0.0,
        streams=exchange.local and config.communication.exchange == "streaming_diloco",
        send_bytes=sent if mesh.pipeline > 1 else 0.0,
        saved_bytes=_saved(step) / every if every else 0.0,
        chunks=tuple(len(c.layers) + c.stage.first + c.stage.last for c in step.shard.virtual),
    )


def _gathering(step: Step, segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
    """Return the segments with the gathers of parameters before them (ZeRO-3), which copy what they receive."""
    if step.zero != 3:
        return segments
    units = {unit.name: (4.0 * unit.size, times) for unit, times in gathers_of(step.layout, step.tied)}

    def with_gathers(one: Pass, sizes: Sequence[float]) -> Pass:
        gathers = tuple(Collective("all_gather", size, "data") for size in sizes)
        return replace(one, gathers=gathers, bytes=one.bytes + 2.0 * sum(sizes))

    made = []
    for segment in segments:
        size, times = units[segment.name]
        sizes = [size, units[EMBEDDING][0]] if step.tied and segment.name == HEAD else [size]
        backward = with_gathers(segment.backward, [size] * times.backward)
        made.append(Segment(segment.name, with_gathers(segment.forward, sizes), backward))
    return tuple(made)


def newton_schulz(layout: MuonLayout) -> tuple[Product, ...]:
    """Return the products of Muon's orthogonalizations in a step of a rank."""
    products: list[Product] = []
    for matrices in layout.alike():
        (short, long), times = sorted(matrices[0].shape), float(ITERATIONS * len(matrices))
        products += [Product(short, k, n, times) for k, n in ((long, short), (short, short), (short, long))]
    return tuple(products)


def unknown(config: Config, spec: ModelSpec) -> str:
    """Return, in words, why ``work_of`` knows no work."""
    if config.parallel.context > 1:
        return "how long context ranks take was not measured (parallel.context)"
    if config.communication.exchange not in KNOWN_EXCHANGES:
        return f"what exchange {config.communication.exchange} sends is not known"
    return f"the work of a {spec.kind} is not known, only that of gpt and rnn models"


def _saved(step: Step) -> float:
    memory = step.memory()
    parameters = step.layout.size // step.mesh.data if step.zero == 3 else step.layout.size
    return float(4 * parameters + memory["optimizer"])


class _Exchange:
    """The collectives of one rank's gradients."""

    def __init__(self, step: Step, segments: tuple[Segment, ...]) -> None:
        self.step = step
        self.options = step.config.communication
        self.ranks = step.mesh.data
        levels = step.mesh.has_levels
        self.summed = self.ranks // step.mesh.data_per_node if levels else self.ranks  # ranks that exchange payloads
        self.axis = "between" if levels else "data"
        self.layout = step.layout
        self.local = self.options.exchange in LOCAL_EXCHANGES and self.ranks > 1
        self.names = {segment.name: index for index, segment in enumerate(segments)}

    def buckets(self) -> tuple[Bucket, ...]:
        """Return the buckets that are sent during the backward pass; none where ranks train independently."""
        if self.ranks == 1 or self.local:
            return ()
        if self.step.zero == 3:
            first, *others = (self._bucket(index) for index in scattered_buckets(self.layout, self.step.tied))
            return (replace(first, ready=len(self.names) - 1), *others)
        return tuple(self._bucket(index) for index in range(len(self.layout.buckets)))

    def rounds(self) -> tuple[Collective, ...]:
        """Return the collectives of a round, each counted by the share of steps that have one."""
        if not self.local:
            return ()
        share = 1.0 / self.options.local.steps
        collectives = []
        for index in range(len(self.layout.buckets)):
            bucket = self._bucket(index)
            for c in (*bucket.collectives, *bucket.later):
                collectives.append(Collective(c.operation, c.bytes, c.axis, share))
        return tuple(collectives)

    def after(self) -> tuple[Collective, ...]:
        """Return the sums of metrics and norms, with ZeRO the gathers of parameters, and Muon's of momentum."""
        step, collectives = self.step, self._tied()
        if step.mesh.tensor * step.mesh.pipeline > 1:
            collectives.append(Collective("all_reduce", 24.0, "model"))
        if self.ranks > 1 and not self.local:
            collectives.append(Collective("all_reduce", 24.0 if step.zero else 16.0, "data"))
        if step.zero in (1, 2):
            gathers = (sum(bucket.parameters) for bucket in step.zero_payloads)
            collectives += [Collective("all_gather", float(size), "data") for size in gathers]
        collectives += [Collective("all_gather", 4.0 * elements, "data") for elements in step.gathered_momentum()]
        if sent := step.sharded_momentum():
            collectives.append(Collective("all_gather", 4.0 * sent * step.mesh.tensor, "tensor"))
        return tuple(collectives)

    def _tied(self) -> list[Collective]:
        """Return the sum of the tied embedding's gradients over the first and the last stage."""
        stage, tied = self.step.shard.stage, self.step.shard.tied
        if not tied or not (stage.first or stage.last):
            return []
        names = [self.layout.slots[first].name for first, _ in self.layout.buckets]
        start, stop = self.layout.bucket_range(names.index(tied[0]))
        return [Collective("all_reduce", 4.0 * (stop - start) / (self.ranks if self.step.zero else 1), "ends")]

    def _bucket(self, index: int) -> Bucket:
        start, stop = self.layout.bucket_range(index)
        first, last = self.layout.buckets[index]
        slots = self.layout.slots[first:last]
        ready = min(self._segment(slot.name) for slot in slots)
        elements = float(stop - start)
        if self.step.zero:
            return self._scattered(ready, elements, index)
        if self.step.mesh.has_levels:
            return self._in_two_levels(ready, index)
        return self._summed(ready, elements, slots)

    def _in_two_levels(self, ready: int, index: int) -> Bucket:
        """Return the bucket whose shards are scattered within the node, summed between nodes, and gathered."""
        shards = self.step.level_shards
        (start, stop), (first, last) = shards.bucket_range(index), shards.buckets[index]
        bucket = self._summed(ready, float(stop - start), shards.slots[first:last])
        size = 4.0 * (stop - start) * self.step.mesh.data_per_node
        scattered, gathered = (Collective(operation, size, "node") for operation in ("reduce_scatter", "all_gather"))
        return replace(bucket, collectives=(scattered, *bucket.collectives), later=(*bucket.later, gathered))

    def _summed(self, ready: int, elements: float, slots: tuple[Slot, ...]) -> Bucket:
        if self.options.compression.algorithm == "none":
            return Bucket(ready, elements, (Collective("all_reduce", 4.0 * elements, self.axis),))
        return self._compressed(ready, elements, slots)

    def _scattered(self, ready: int, elements: float, index: int) -> Bucket:
        sent = self.step.zero_payloads[index]
        if not sent.compressed:
            return Bucket(ready, elements, (Collective("reduce_scatter", float(sent.gradients), "data"),))
        collectives = [Collective("all_to_all", float(sent.gradients), "data")]
        if sent.rest:
            collectives.append(Collective("all_reduce", float(sent.rest), "data"))
        count = float(sent.compressed)  # of all ranks' shards on a rank, and of a rank's shard on all ranks
        return Bucket(ready, elements, tuple(collectives), self.options.compression.algorithm, count, count, 1.0)

    def _compressed(self, ready: int, elements: float, slots: tuple[Slot, ...]) -> Bucket:
        settings, matrices = self.options.compression, self.options.compression.algorithm == "power_sgd"
        shapes = [_matrix(slot) if matrices else (slot.stop - slot.start,) for slot in slots]
        taken = [shape for shape in shapes if is_compressible(settings, shape, self.summed)]
        count = sum(math.prod(shape) for shape in taken)
        dense = sum(math.prod(shape) for shape in shapes) - count
        sent = [payload(settings, shape, self.summed) for shape in (taken if matrices else [(count,)] if count else [])]
        totals: dict[tuple[str, bool], float] = {("all_reduce", False): 4.0 * dense} if dense else {}
        later: tuple[Collective, ...] = ()
        if sent:
            operation, total = sent[0].operation, sum(one.bytes for one in sent)
            whole = total * self.summed if operation == "all_gather" else total
            if matrices:  # one factor, and the other after that of all buckets
                whole /= 2
                later = (Collective(operation, whole, self.axis),)
            # Sums of the same precision are one collective.
            key = (operation, settings.algorithm in HALF_PRECISION)
            totals[key] = totals.get(key, 0.0) + whole
        collectives = [Collective(operation, size, self.axis) for (operation, _), size in totals.items()]
        received = count * sent[0].received if sent and sent[0].operation == "all_gather" else 0.0
        tensors = float(len(sent))
        return Bucket(ready, elements, tuple(collectives), settings.algorithm, float(count), received, tensors, later)

    def _segment(self, name: str) -> int:
        """Return the index of the segment whose backward pass gives the gradient of ``name``."""
        words = name.split(".")
        if words[0] == "layers":
            return self.names[".".join(words[:2])]
        return self.names.get("embed", len(self.names) - 1) if words[0] == "embed" else len(self.names) - 1


def _matrix(slot: Slot) -> tuple[int, ...]:
    if len(slot.shape) > 1:
        return (slot.shape[0], (slot.stop - slot.start) // slot.shape[0])
    return (slot.stop - slot.start,)
