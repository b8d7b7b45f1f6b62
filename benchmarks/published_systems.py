"""Systems whose speeds were published: torchtitan and Megatron-LM on H100.

They are not hvdlm: their work is described here by hand, from their sizes and sources.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from hvdlm.parallel.mesh import Mesh
from hvdlm.planning.hardware import Hardware
from hvdlm.planning.rates import Computation, Network
from hvdlm.planning.step_time import StepTime, step_time
from hvdlm.planning.work import Attention, Bucket, Collective, Pass, Product, Segment, Work, gradients_of

PEAK = 989.4e12  # FLOP/s of an H100 in bf16


@dataclass(frozen=True)
class Transformer:
    """Sizes of a decoder-only Transformer; ``kv``: width of keys."""

    layers: int
    width: int
    heads: int
    mlp: int
    vocab: int
    context: int
    kv: int
    gated: bool = False
    tied: bool = False

    @property
    def layer_weights(self) -> float:
        """Weights of a layer's products."""
        return self.width * (2.0 * self.width + 2 * self.kv + (3 if self.gated else 2) * self.mlp)


# --- torchtitan: FSDP2, PyTorch without compilation, at commit 9dec370 (26 December 2024) ---

LLAMA_8B = Transformer(32, 4096, 32, 14336, 128256, 8192, 1024, gated=True)


def torchtitan(model: Transformer, rows: int) -> Work:
    """Return the work of a rank with ``rows`` sequences in FSDP with selective activation checkpointing ("op")."""
    h = model.width
    # Read and written per token, in bf16 (2) and float32 (4): nn.RMSNorm computes in float32 step by step (cast,
    # square, mean, two products); rotation in complex float32; keys and values repeated; the copy of the attention's
    # output; SiLU and its product; two sums of the residual.
    norms, rotation, repeated = 2 * 40.0 * h, 20.0 * (h + model.kv), 2 * 2.5 * h
    each = norms + rotation + repeated + 4.0 * h + 10.0 * model.mlp + 2 * 6.0 * h
    return fsdp(model, rows, each, recomputed=True)


def fsdp(model: Transformer, rows: int, each: float, recomputed: bool, micro_batches: int = 1) -> Work:
    """Return the work of a rank in FSDP with mixed precision.

    Args:
        rows: sequences in a micro-batch.
        each: bytes that element-wise operations of a layer read and write per token, forward.
        recomputed: whether they, and every second product, are computed again in the backward pass.
    """
    tokens, h = float(rows * model.context), model.width
    inward = 2 if model.gated else 1
    products = (
        *(Product(tokens, h, n) for n in (h, model.kv, model.kv)), Product(tokens, h, h),
        *(Product(tokens, h, model.mlp) for _ in range(inward)), Product(tokens, model.mlp, h),
    )  # fmt: skip
    attention = Attention(rows * model.heads, model.context, h / model.heads)
    weights = model.layer_weights
    # FSDP: parameters are gathered as bf16, and copied out; gradients copied in, cast to float32 and scattered.
    gather, scatter = (
        Collective("all_gather", 2.0 * weights, "data"),
        Collective("reduce_scatter", 4.0 * weights, "data"),
    )
    forward = Pass(products, (attention,), each * tokens + 4.0 * weights, gathers=(gather,))
    again = Pass(products[1::2], (), each * tokens) if recomputed else Pass()
    backward = again + Pass(
        gradients_of(products), (replace(attention, backward=True),), 2.0 * each * tokens + 10.0 * weights,
        gathers=(gather,), scatters=(scatter,),
    )  # fmt: skip
    # The last layer stays gathered between its passes; embedding, last norm and head are one unit, which does, too.
    last = replace(backward, gathers=())
    layers = [Segment(f"layers.{i}", forward, backward if i < model.layers - 1 else last) for i in range(model.layers)]
    ends = (1.0 if model.tied else 2.0) * model.vocab * h
    table = Pass(bytes=8.0 * tokens * h + 2 * 4.0 * ends, gathers=(Collective("all_gather", 2.0 * ends, "data"),))
    table_back = Pass(
        bytes=4.0 * tokens * h + 4.0 * model.vocab * h + 6.0 * ends,
        scatters=(Collective("reduce_scatter", 4.0 * ends, "data"),),
    )
    product = (Product(tokens, h, model.vocab),)
    # Scores in bf16, their copy in float32, its logarithmic softmax, and the gradients of all of them.
    head = Segment(
        "head",
        Pass(product, bytes=40.0 * tokens * h + 14.0 * tokens * model.vocab),
        Pass(gradients_of(product), bytes=80.0 * tokens * h + 18.0 * tokens * model.vocab),
    )
    parameters = model.layers * weights + ends
    segments = (Segment("embed", table, table_back), *layers, head)
    return Work(segments, micro_batches, tokens, update_elements=parameters)


def with_rates(hardware: Hardware, **changes: float) -> Hardware:
    """Return a machine whose rates differ in some fields."""
    return replace(hardware, rates=tuple(replace(rates, **changes) for rates in hardware.rates))


def torchtitan_time(hardware: Hardware, ranks: int) -> StepTime:
    """Return the step of Llama 3.1 8B, two sequences of 8,192 tokens a GPU.

    On Meta's H100 with HBM2e: 2.4 TB/s, of which copies reach the same share as of HBM3's 3.35.
    """
    memory = hardware.rates_of("torch", "bf16").memory_bytes_per_second * 2.4 / 3.35
    hardware = with_rates(hardware, memory_bytes_per_second=memory, seconds_per_operation=0.0)
    return fsdp_time(hardware, torchtitan(LLAMA_8B, 2), ranks)


def fsdp_time(hardware: Hardware, work: Work, ranks: int) -> StepTime:
    """Return the step of a model that is sharded over ``ranks``."""
    # AdamW with foreach: 21 passes over vectors of float32, and 3 of clipping, instead of a fused kernel's 8.
    shard = work.update_elements / ranks
    work = replace(work, update_elements=shard, update_bytes=4.0 * (24 - 8) * shard)
    mesh = Mesh(ranks, 1, 1)
    computation = Computation(hardware, "torch", "bf16", hardware.ranks_per_node, ranks)
    return step_time([work], "1f1b", computation, Network(hardware, mesh))


def fitted(hardware: Hardware) -> Hardware:
    """Return ``hardware`` with the product efficiency that gives 5,762 tokens a second and GPU on 8 GPUs."""
    return fit(hardware, lambda candidate: tokens_per_second(candidate, 8), 5762)


def fit(hardware: Hardware, predicted: Callable[[Hardware], float], measured: float) -> Hardware:
    """Return ``hardware`` with the product efficiency whose ``predicted`` speed is the measured one."""
    low, high = 0.1, 1.5
    for _ in range(60):
        efficiency = (low + high) / 2
        candidate = with_rates(hardware, product_efficiency=efficiency)
        low, high = (efficiency, high) if predicted(candidate) < measured else (low, efficiency)
    return with_rates(hardware, product_efficiency=efficiency)


def tokens_per_second(hardware: Hardware, ranks: int) -> float:
    """Return the tokens a second and GPU of torchtitan."""
    return 2 * LLAMA_8B.context / torchtitan_time(hardware, ranks).seconds


def torchtitan_mfu(rate: float) -> float:
    """Return the model FLOPs utilization of a rate in tokens a second and GPU, by the formula of Megatron-LM."""
    m = LLAMA_8B
    flops = 6.0 * (m.layers * m.layer_weights + m.vocab * m.width) + 12.0 * m.layers * m.width * m.context
    return rate * flops / PEAK


# --- Megatron-LM: Megatron-Core r0.8.0 (July 2024), README "Training Speed and Scalability" ---


@dataclass(frozen=True)
class MegatronCase:
    """A row of the published table, and its MFU."""

    name: str
    heads: int
    width: int
    layers: int
    tensor: int
    pipeline: int
    data: int
    batch: int
    teraflops: float

    @property
    def model(self) -> Transformer:
        """All have a vocabulary of 131,072 and sequences of 4,096 tokens."""
        return Transformer(self.layers, self.width, self.heads, 4 * self.width, 131072, 4096, self.width)

    @property
    def flops(self) -> float:
        """Model FLOPs of a step by Megatron-LM's formula, attention without causality: Narayanan et al. 2021, eq. 3."""
        m = self.model
        dense = 72.0 * self.batch * m.context * m.layers * m.width**2
        return dense * (1 + m.context / (6 * m.width) + m.vocab / (12 * m.layers * m.width))


MEGATRON = (
    MegatronCase("1.7B", 16, 2048, 24, 1, 1, 48, 192, 408.8),
    MegatronCase("7.1B", 32, 4096, 30, 2, 1, 48, 192, 465.9),
    MegatronCase("16B", 48, 6144, 32, 4, 1, 48, 192, 489.1),
    MegatronCase("32B", 56, 7168, 48, 8, 1, 48, 192, 459.6),
    MegatronCase("70B", 64, 8192, 84, 8, 2, 48, 384, 419.7),
    MegatronCase("119B", 80, 10240, 92, 8, 4, 48, 768, 420.5),
    MegatronCase("177B", 96, 12288, 96, 8, 6, 48, 1152, 432.8),
    MegatronCase("314B", 128, 16384, 96, 8, 8, 48, 1536, 474.4),
    MegatronCase("462B", 144, 18432, 112, 8, 16, 48, 3072, 459.9),
)


def megatron_stage(case: MegatronCase, stage: int) -> Work:
    """Return the work of one stage's rank: sequence parallelism, distributed optimizer.

    A micro-batch is one sequence in a pipeline, and all 4 of a replica without one.
    """
    m, t = case.model, case.tensor
    rows = 1 if case.pipeline > 1 else case.batch // case.data
    tokens, h = float(rows * m.context), m.width
    products = (
        Product(tokens, h, 3 * h / t), Product(tokens, h / t, h),
        Product(tokens, h, m.mlp / t), Product(tokens, m.mlp / t, h),
    )  # fmt: skip
    attention = Attention(rows * m.heads / t, m.context, h / m.heads)
    whole = 2.0 * tokens * h
    between = (Collective("all_gather", whole, "tensor"), Collective("reduce_scatter", whole, "tensor")) * 2
    again = (Collective("all_gather", whole, "tensor"),) * 2  # inputs of the products, for the weights' gradients
    weights = m.layer_weights / t
    # Fused kernels in bf16: norms (read, write), biases with dropout and residual (2 read, 1 write), bias with GELU.
    forward = Pass(products, (attention,), tokens * h / t * (2 * 4.0 + 2 * 6.0 + 16.0), pipelined=between)
    backward = Pass(
        gradients_of(products), (replace(attention, backward=True),),
        tokens * h / t * (2 * 6.0 + 2 * 4.0 + 24.0) + 8.0 * weights, pipelined=between + again,
    )  # fmt: skip
    own = case.layers // case.pipeline
    segments = [Segment(f"layers.{i}", forward, backward) for i in range(own)]
    ends = m.vocab * h / t
    held, first, last = own * weights, stage == 0, stage == case.pipeline - 1
    if first:
        table = Pass(bytes=4.0 * tokens * h, blocking=between[1:2])
        segments.insert(
            0, Segment("embed", table, replace(table, bytes=4.0 * tokens * h + 8.0 * ends, blocking=between[:1]))
        )
        held += ends
    if last:
        product, scores = (Product(tokens, h, m.vocab / t),), tokens * m.vocab / t
        segments.append(
            Segment(
                "head",
                Pass(product, bytes=14.0 * scores, pipelined=between[:1]),
                Pass(gradients_of(product), bytes=14.0 * scores + 8.0 * ends, pipelined=between[:2]),
            )
        )
        held += 0.0 if first else ends
    buckets = tuple(
        Bucket(index, held / len(segments), (Collective("reduce_scatter", 4.0 * held / len(segments), "data"),))
        for index in reversed(range(len(segments)))
    )
    # Parameters are gathered in bf16 while the first micro-batch is computed.
    gathers = tuple(Collective("all_gather", 2.0 * held / len(segments), "data") for _ in segments)
    return Work(
        tuple(segments), case.batch // case.data // rows, tokens, buckets, update_elements=held / case.data,
        update_bytes=4.0 * held, first_gathers=gathers, send_bytes=whole / t if case.pipeline > 1 else 0.0,
    )  # fmt: skip


def megatron_time(hardware: Hardware, case: MegatronCase) -> StepTime:
    """Return a step's time; stages are interleaved with one layer each."""
    mesh = Mesh(case.data, case.pipeline, case.tensor)
    # cuDNN's attention is about as fast as FlashAttention-3, which reaches 590 of 989 TFLOP/s with 4,096 positions
    # (pytorch/benchmark, pull request 2391).
    hardware = with_rates(hardware, attention_efficiency=0.6, seconds_per_operation=0.0)
    computation = Computation(hardware, "torch", "bf16", hardware.ranks_per_node, mesh.size)
    works = [megatron_stage(case, stage) for stage in range(case.pipeline)]
    return step_time(works, "1f1b", computation, Network(hardware, mesh), interleaved=case.layers // case.pipeline)


def megatron_mfu(hardware: Hardware, case: MegatronCase) -> float:
    """Return the predicted model FLOPs utilization."""
    ranks = case.data * case.pipeline * case.tensor
    return case.flops / megatron_time(hardware, case).seconds / ranks / PEAK
