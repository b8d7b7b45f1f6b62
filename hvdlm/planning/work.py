"""What one rank's step computes and communicates, by kind of operation: the input of predicted seconds.

Work is independent of the machine. It is made from a configuration (``work_of``), or by hand for models and systems
that a configuration can't express, such as those of published measurements.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Product:
    """``count`` products of ``[m, k]`` and ``[k, n]`` matrices."""

    m: float
    k: float
    n: float
    count: float = 1.0

    @property
    def flops(self) -> float:
        """Multiplications and additions of all of them."""
        return 2.0 * self.m * self.k * self.n * self.count


@dataclass(frozen=True)
class Attention:
    """``count`` causal attentions of ``heads`` (rows x heads) over ``time`` positions, with heads of ``width``."""

    heads: float
    time: float
    width: float
    backward: bool = False
    count: float = 1.0

    @property
    def flops(self) -> float:
        """FLOPs of the two products, of which causality leaves half, in one forward pass."""
        return 2.0 * self.heads * self.time * self.time * self.width * self.count


@dataclass(frozen=True)
class Collective:
    """A collective over one axis of the mesh.

    Attributes:
        operation: all_reduce, all_gather, reduce_scatter, all_to_all, or send (to the neighbour on the axis).
        bytes: of the whole tensor: the sum's, what is gathered in all, what is scattered in all.
        axis: data, tensor, pipeline, model (all ranks of one copy of the model), ends (the first and last stage), or of
            sums in two levels: node (data ranks of one node) and between (those in the same place of every node).
        count: how often.
    """

    operation: str
    bytes: float
    axis: str
    count: float = 1.0


@dataclass(frozen=True)
class Overlapped:
    """A collective that is started before ``products`` of its pass, and waited for after them."""

    collective: Collective
    products: tuple[Product, ...]


@dataclass(frozen=True)
class Pass:
    """The forward or backward pass of one segment and micro-batch.

    Attributes:
        products, attention: its products and attentions.
        bytes: that element-wise operations read and write.
        scores: logits of the loss.
        operations: that are started.
        time_steps: of recurrent layers.
        seconds: of other computation, where they are known.
        blocking: collectives that the pass waits for.
        overlapped: collectives that it waits for when some of its ``products`` are computed.
        pipelined: collectives that are cut into chunks, one for each rank, and overlap with the pass's products.
        gathers: all-gathers of parameters before it, which overlap with the segment before (FSDP).
        scatters: reduce-scatters of gradients after it, which overlap with the segments that follow (FSDP, ZeRO-2).
    """

    products: tuple[Product, ...] = ()
    attention: tuple[Attention, ...] = ()
    bytes: float = 0.0
    scores: float = 0.0
    operations: float = 0.0
    time_steps: float = 0.0
    seconds: float = 0.0
    blocking: tuple[Collective, ...] = ()
    overlapped: tuple[Overlapped, ...] = ()
    pipelined: tuple[Collective, ...] = ()
    gathers: tuple[Collective, ...] = ()
    scatters: tuple[Collective, ...] = ()

    def __add__(self, other: Pass) -> Pass:
        return Pass(
            self.products + other.products,
            self.attention + other.attention,
            self.bytes + other.bytes,
            self.scores + other.scores,
            self.operations + other.operations,
            self.time_steps + other.time_steps,
            self.seconds + other.seconds,
            self.blocking + other.blocking,
            self.overlapped + other.overlapped,
            self.pipelined + other.pipelined,
            self.gathers + other.gathers,
            self.scatters + other.scatters,
        )

    @property
    def flops(self) -> float:
        """FLOPs of products and attentions, those of attention's backward pass included."""
        attention = sum(a.flops * (2.5 if a.backward else 1.0) for a in self.attention)
        return sum(product.flops for product in self.products) + attention


def gradients_of(products: tuple[Product, ...], inputs: bool = True, weights: bool = True) -> tuple[Product, ...]:
    """Return the products of the backward pass: the gradients of inputs, ``[m, n] x [n, k]``, and of weights."""
    of_inputs = tuple(Product(p.m, p.n, p.k, p.count) for p in products if inputs)
    return of_inputs + tuple(Product(p.k, p.m, p.n, p.count) for p in products if weights)


@dataclass(frozen=True)
class Segment:
    """Consecutive operations between which buckets can become ready: the embedding, a layer, or the head."""

    name: str
    forward: Pass
    backward: Pass


@dataclass(frozen=True)
class Bucket:
    """A bucket of gradients, in the order of their collectives.

    Attributes:
        ready: index of the segment whose backward pass completes it.
        elements: float32 gradients.
        collectives: that sum it, one after the other, from when it is ready.
        later: further rounds of them, after the backward pass (power_sgd).
        algorithm: compressor; ``none``: sent as it is.
        compressed: elements that are compressed.
        tensors: that are compressed, each by operations of its own.
        received: elements of all ranks' payloads that this rank decompresses.
    """

    ready: int
    elements: float
    collectives: tuple[Collective, ...]
    algorithm: str = "none"
    compressed: float = 0.0
    received: float = 0.0
    tensors: float = 0.0
    later: tuple[Collective, ...] = ()


@dataclass(frozen=True)
class Work:
    """One rank's step.

    Attributes:
        segments: of its stage, in the order of the forward pass.
        chunks: number of segments of each of the rank's virtual stages; empty: it has one stage.
        micro_batches: of a step.
        tokens: of a micro-batch.
        buckets: whose collectives are started during the last backward pass.
        scatters_every: whether they are started in every micro-batch's backward pass (ZeRO-2).
        update_elements: parameters that this rank updates, element by element.
        moments: state vectors of the optimizer.
        update_products: of the update (Muon).
        update_bytes: that clipping, zeroing and copying of the flat vectors read and write beside the update itself.
        first_gathers: gathers of parameters that overlap with the first forward pass, segment by segment.
        after: collectives after the gradients: norm, metrics, parameters (ZeRO).
        rounds: collectives of rounds, by the steps between them (local SGD, DiLoCo).
        rounds_bytes: that a round's outer update reads and writes, by the steps between them.
        rounds_share: share of steps that end a round.
        streams: whether rounds are spread over their steps and travel during computation (streaming DiLoCo).
        sends: bytes of one micro-batch's activations between two stages; 0: one stage.
        saved_bytes: bytes of a save that this rank copies, per step.
    """

    segments: tuple[Segment, ...]
    micro_batches: int = 1
    tokens: float = 0.0
    buckets: tuple[Bucket, ...] = ()
    scatters_every: bool = False
    update_elements: float = 0.0
    moments: int = 2
    update_products: tuple[Product, ...] = ()
    update_bytes: float = 0.0
    first_gathers: tuple[Collective, ...] = ()
    after: tuple[Collective, ...] = ()
    rounds: tuple[Collective, ...] = ()
    rounds_bytes: float = 0.0
    rounds_share: float = 0.0
    streams: bool = False
    send_bytes: float = 0.0
    saved_bytes: float = 0.0
    chunks: tuple[int, ...] = ()

    @property
    def gathered(self) -> float:
        """The parameters that a step gathers after the update (ZeRO)."""
        return sum(c.count * c.bytes / 4 for c in self.after if c.operation == "all_gather" and c.axis == "data")

    @property
    def scattered(self) -> float:
        """The gradients that a step scatters in all micro-batches (ZeRO-2)."""
        return self.micro_batches * sum(bucket.elements for bucket in self.buckets) if self.scatters_every else 0.0

    @property
    def forward(self) -> Pass:
        """The forward pass of a micro-batch through all segments."""
        return _total([segment.forward for segment in self.segments])

    @property
    def backward(self) -> Pass:
        """The backward pass of a micro-batch through all segments."""
        return _total([segment.backward for segment in self.segments])

    @property
    def flops(self) -> float:
        """FLOPs of a step on this rank, recomputation included."""
        return self.micro_batches * (self.forward.flops + self.backward.flops)


def _total(passes: list[Pass]) -> Pass:
    total = Pass()
    for one in passes:
        total = total + one
    return total
