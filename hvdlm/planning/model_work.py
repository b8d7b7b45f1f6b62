"""The work of the built-in models, layer by layer: products, attention, element-wise bytes, collectives between ranks.

The bytes of element-wise operations are those of PyTorch's separate kernels; compilers fuse them, which rates of a
machine, or ``FUSED``, account for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hvdlm.planning.closed_forms import Step
from hvdlm.planning.work import Attention, Collective, Overlapped, Pass, Product, Segment, gradients_of

FUSED = 0.5  # share of element-wise bytes and operations that remain where they are compiled


def segments_of(step: Step, fused: bool = False) -> tuple[Segment, ...]:
    """Return the segments of a rank's stage, in the order of the forward pass; ``fused``: compiled."""
    make = _GPT if step.kind == "gpt" else _RNN
    segments = make(step).segments()
    return tuple(_fuse(segment) for segment in segments) if fused else tuple(segments)


def _fuse(segment: Segment) -> Segment:
    return Segment(segment.name, _fused_pass(segment.forward), _fused_pass(segment.backward))


def _fused_pass(one: Pass) -> Pass:
    # In compiled steps, collectives end in the order in which they are called.
    blocking = one.blocking + tuple(beside.collective for beside in one.overlapped)
    return replace(one, bytes=FUSED * one.bytes, operations=FUSED * one.operations, blocking=blocking, overlapped=())


class _Model:
    """A rank's segments: the embedding, layers, the head."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.s: Any = step.s
        self.tensor = step.mesh.tensor
        self.tokens = step.tokens
        self.item = step.item
        first, last = step.shard.range_of(self.s.vocab)
        self.vocab = last - first
        self.sizes: dict[str, tuple[int, int]] = {}  # by prefix: parameters and their elements on this rank
        for param in step.shard.params:
            words = param.spec.name.split(".")
            prefix = ".".join(words[:2]) if words[0] == "layers" else words[0]
            count, elements = self.sizes.get(prefix, (0, 0))
            size = 1
            for extent in param.shard.extent:
                size *= extent
            self.sizes[prefix] = (count + 1, elements + size)

    def segments(self) -> list[Segment]:
        stage = self.step.shard.stage
        segments = [self.embedding()] if stage.first else []
        layer: Segment | None = None
        for index in self.step.shard.layers:
            layer = layer or self.layer(index)
            segments.append(Segment(f"layers.{index}", layer.forward, layer.backward))
        return [*segments, self.head()] if stage.last else segments

    def layer(self, index: int) -> Segment:
        raise NotImplementedError

    def embedding(self) -> Segment:
        """Rows are looked up; their gradients are added into one of the table's size, which is added to the rest."""
        width, (count, elements) = self.s.width, self.sizes.get("embed", (1, 0))
        gather = self.summed("embed", backward=False)
        unpacked = self.step.unpacked_bytes() * elements
        forward = Pass(bytes=8.0 * self.tokens * width * count + unpacked, operations=2.0 * count, blocking=gather)
        backward = Pass(
            bytes=8.0 * self.tokens * width * count + (4.0 + self.step.gradient_bytes()) * elements,
            operations=4.0 * count,
            blocking=self.summed("embed", backward=True) + self.partial_sums("embed.positions"),
        )
        return Segment("embed", forward, backward)

    def head(self) -> Segment:
        """The last norm, the scores and the loss."""
        width, tokens = self.s.width, self.tokens
        product = (Product(tokens, width, self.vocab),)
        _, elements = self.sizes.get("head", (0, self.vocab * width))
        _, own = self.sizes.get("head", (0, 0))  # of a tied table, the embedding counts the copy
        cast = 6.0 if self.item == 2 else 0.0
        blocking = self.summed("head", backward=False)
        if self.tensor > 1:
            # Of each position, three figures from every rank, with label smoothing four.
            figures = 4 if self.step.config.train.label_smoothing else 3
            blocking += (Collective("all_gather", 4.0 * figures * tokens * self.tensor, "tensor"),)
        scores = float(tokens * self.vocab)
        forward = Pass(
            product,
            bytes=16.0 * tokens * width + cast * elements + self.step.unpacked_bytes() * own,
            scores=scores,
            operations=8.0,
            blocking=blocking,
        )
        sums = self.summed("head", backward=True)
        beside = tuple(Overlapped(one, _of_weights(product)) for one in sums if self.step.kind == "gpt")
        backward = Pass(
            gradients_of(product),
            bytes=24.0 * tokens * width + self.step.gradient_bytes() * elements,
            scores=scores,
            operations=12.0,
            blocking=(() if beside else sums) + self.partial_sums("final_norm."),
            overlapped=beside,
        )
        return Segment("head", forward, backward)

    def summed(self, where: str, backward: bool) -> tuple[Collective, ...]:
        """Return the collectives between tensor ranks of the embedding or the head."""
        if self.tensor == 1:
            return ()
        whole = float(self.item * self.tokens * self.s.width)
        if not self.step.sequence:
            needed = (where == "embed") != backward
            return (Collective("all_reduce", whole, "tensor"),) if needed else ()
        # The embedding scatters its sum over the positions, the head gathers them; backward the other way round.
        gathers = (where == "head") != backward
        return (Collective("all_gather" if gathers else "reduce_scatter", whole, "tensor"),)

    def partial_sums(self, prefix: str) -> tuple[Collective, ...]:
        """Return the sum of gradients that every tensor rank has only a part of: of parameters between products."""
        if self.tensor == 1 or self.step.kind != "gpt":
            return ()
        elements = self.step.partial(prefix)
        return (Collective("all_reduce", 4.0 * elements, "tensor"),) if elements else ()


def _of_weights(products: tuple[Product, ...]) -> tuple[Product, ...]:
    return gradients_of(products, inputs=False)


class _GPT(_Model):
    """Transformer layers."""

    def layer(self, index: int) -> Segment:
        """Return a layer's passes; all are alike."""
        between, element_bytes = self.sums_between(), self.element_bytes()
        params, elements = self.sizes[f"layers.{index}"]
        forward = Pass(
            self.products(),
            self.attention(False),
            bytes=element_bytes + self.step.unpacked_bytes() * elements,
            operations=self.operations(),
            blocking=between,
        )
        trained = not self.step.spec.frozen
        # Gradients of half precision are cast before they are added.
        added = (self.step.gradient_bytes() + (6.0 if self.item == 2 else 0.0)) * elements
        backward = Pass(
            gradients_of(forward.products, weights=trained),
            self.attention(True),
            bytes=2.0 * element_bytes + added,
            operations=1.5 * forward.operations + 2.0 * params,
            # With sharded positions, the gradients of outputs are gathered before.
            blocking=(between[::2] if self.step.sequence else ()) + self.partial_sums("layers."),
            overlapped=self.sums_of_inputs(between, trained),
        )
        if self.step.config.train.activation_checkpointing:
            again = forward
            if self.tensor > 1 and not self.step.habits.recomputes_all:  # without the layer's last sum
                again = replace(forward, blocking=between[: 3 if self.step.sequence else 1])
            backward = again + backward
        return Segment(f"layers.{index}", forward, backward)

    def sums_of_inputs(self, between: tuple[Collective, ...], trained: bool) -> tuple[Overlapped, ...]:
        """Return the sums of the gradients of the attention's and the MLP's input, beside those of their weights."""
        sums = between[1::2] if self.step.sequence else between
        inward = self.products()[:-2]  # those of attention's input are one or three
        of_attention = 1 if self.tokens >= 256 else 3
        weights = inward[:of_attention], inward[of_attention:]
        pairs = zip(sums, weights, strict=False)  # no sums with one rank
        return tuple(Overlapped(one, _of_weights(columns) if trained else ()) for one, columns in pairs)

    def products(self) -> tuple[Product, ...]:
        """Return the products of the forward pass; those of the same input are one from 256 positions on."""
        s, tokens = self.s, self.tokens
        heads, kv, inner = self.columns()
        joined = tokens >= 256
        inward: Sequence[int] = (inner, inner) if s.gated else (inner,)
        of_attention: Sequence[int] = (heads, kv, kv)
        columns = [sum(of_attention), sum(inward)] if joined else [*of_attention, *inward]
        products = [Product(tokens, s.width, n) for n in columns]
        return (*products, Product(tokens, heads, s.width), Product(tokens, inner, s.width))

    def columns(self) -> tuple[int, int, int]:
        """Return this rank's columns of queries, of keys, and of the MLP."""
        s, t = self.s, self.tensor
        return s.heads_width // t, s.head_width * max(1, s.kv_heads // t), s.mlp_width // t

    def attention(self, backward: bool) -> tuple[Attention, ...]:
        """Return the attention of this rank's heads.

        With a window, a block of it attends to itself, and every further one to twice as many keys without the half
        that causality saves.
        """
        heads, time, window = self.step.rows * self.s.heads / self.tensor, self.step.time, self.s.local_window
        if not 0 < window < time:
            return (Attention(heads, time, self.s.head_width, backward),)
        return (Attention(heads, window, self.s.head_width, backward, 1.0 + 4.0 * (-(-time // window) - 1)),)

    def element_bytes(self) -> float:
        """Return the bytes of norms, rotation, activation, residuals, casts and copied weights."""
        s, item, tokens = self.s, float(self.item), float(self.tokens)
        between = tokens / self.tensor if self.step.sequence else tokens
        heads, kv, inner = self.columns()
        norms = 2 * 8.0 * s.width * between
        residuals = 2 * (8.0 + item) * s.width * between
        dropped = 2 * 10.0 * s.width * between if s.dropout else 0.0
        rotation = 40.0 * (heads + kv) * tokens * s.rotary_width / s.head_width
        norms += 8.0 * (heads + kv) * tokens if s.qk_norm else 0.0
        activation = (5 if s.gated else 2) * item * inner * tokens
        copies = 2 * item * heads * tokens
        inward = 2 if s.gated else 1
        joined = s.width * (heads + 2 * kv) + (s.width * inner * inward if inward > 1 else 0)
        weights = s.width * (2 * heads + 2 * kv) + (inward + 1) * s.width * inner
        copied = 8.0 * joined if self.tokens >= 256 and item == 4 else 0.0
        casts = 6.0 * weights + 4.0 * joined + 2 * 6.0 * s.width * tokens if item == 2 else 0.0
        return norms + residuals + dropped + rotation + activation + copies + copied + casts

    def operations(self) -> float:
        """Return how many operations a layer's forward pass starts."""
        s = self.s
        count = 14.0 + (12.0 if s.positions == "rotary" else 0.0) + (1.0 if s.gated else 0.0)
        count += 2.0 if self.tokens >= 256 else 2.0 + s.gated
        count += 2.0 if s.qk_norm else 0.0
        count += 2.0 if s.dropout else 0.0
        return count + (8.0 if self.item == 2 else 0.0)

    def sums_between(self) -> tuple[Collective, ...]:
        """Return one pass's collectives between tensor ranks: around the attention and around the MLP."""
        if self.tensor == 1:
            return ()
        whole = float(self.item * self.tokens * self.s.width)
        if not self.step.sequence:
            return (Collective("all_reduce", whole, "tensor"),) * 2
        return (Collective("all_gather", whole, "tensor"), Collective("reduce_scatter", whole, "tensor")) * 2


class _RNN(_Model):
    """Recurrent layers."""

    def layer(self, index: int) -> Segment:
        """Return a layer's passes: the product of all inputs, then time step by time step."""
        s, rows, time = self.s, self.step.rows, self.step.time
        units = s.width // self.tensor
        products = (
            Product(self.tokens, s.width, s.gates * units),
            Product(rows, s.width, s.gates * units, float(time)),
        )
        gates = 4.0 * self.tokens * s.gates * units
        state = float(self.item * rows * s.width)
        forward_sums: tuple[Collective, ...] = ()
        backward_sums: tuple[Collective, ...] = ()
        if self.tensor > 1:
            forward_sums = (Collective("all_gather", state, "tensor", float(time)),)
            backward_sums = (
                Collective("reduce_scatter", state, "tensor", float(time)),
                Collective("all_gather", state, "tensor"),
            )
        params, elements = self.sizes[f"layers.{index}"]
        unpacked = self.step.unpacked_bytes() * elements
        forward = Pass(
            products, bytes=6.0 * gates + unpacked, operations=6.0, time_steps=float(time), blocking=forward_sums
        )
        backward = Pass(
            gradients_of(products),
            bytes=10.0 * gates + self.step.gradient_bytes() * elements,
            operations=6.0 + 2.0 * params,
            time_steps=float(time),
            blocking=backward_sums,
        )
        if self.step.config.train.activation_checkpointing:
            backward = forward + backward
        return Segment(f"layers.{index}", forward, backward)
