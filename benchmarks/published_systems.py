"""Systems whose speeds were published: torchtitan and Megatron-LM on H100, Horovod on P100.

They are not hvdlm: their work is described here by hand, from their sizes and sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hvdlm.parallel.mesh import Mesh
from hvdlm.planning.hardware import Hardware
from hvdlm.planning.rates import Computation, Network, slowest_of
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

    @property
    def layer_weights(self) -> float:
        """Weights of a layer's products."""
        return self.width * (2.0 * self.width + 2 * self.kv + (3 if self.gated else 2) * self.mlp)


# --- How much slower the slowest of many GPUs is: MosaicML's llm-foundry, scripts/train/benchmarking/README.md ---

# Tokens a second and GPU by the number of GPUs, with equal micro-batches: of MPT models with 2,048 positions, on H100
# (13, 3, 1 and 0.76 billion parameters) and on A100 40 GB (13, 7, 3, 1, 0.76, 0.35 and 0.125 billion). Left out: 1
# billion on 32 A100, a fifth slower than on 16 and on 64.
LLM_FOUNDRY = (
    {8: 4792, 16: 4767, 32: 4811, 64: 4800},
    {32: 23021, 64: 22525},
    {16: 46037, 32: 45130, 64: 44402},
    {16: 68551, 32: 67971},
    {64: 1976, 128: 1972},
    {32: 3725, 64: 3665, 128: 3623},
    {32: 9914, 64: 9736, 128: 9538},
    {64: 19001, 128: 18647},
    {16: 29607, 32: 29648, 64: 29344, 128: 28940},
    {16: 55413, 32: 53811, 64: 52689, 128: 51934},
    {16: 130535, 32: 127122, 64: 125234, 128: 123936},
)


def speed_deviation() -> float:
    """Return the deviation that fits these rows best, by least squares of logarithms; each model has its own speed."""
    products = squares = 0.0
    for row in LLM_FOUNDRY:
        slowest = np.array([slowest_of(ranks, 1.0) for ranks in row])
        slowness = -np.log(np.array(list(row.values()), float))
        slowest -= slowest.mean()
        products += float((slowest * slowness).sum())
        squares += float((slowest**2).sum())
    return products / squares


# --- torchtitan: FSDP2, PyTorch without compilation, at commit 9dec370 (26 December 2024) ---

LLAMA_8B = Transformer(32, 4096, 32, 14336, 128256, 8192, 1024, gated=True)


def torchtitan(model: Transformer, rows: int) -> Work:
    """Return the work of a rank with ``rows`` sequences in FSDP with selective activation checkpointing ("op")."""
    tokens, h = float(rows * model.context), model.width
    columns = (h, model.kv, model.kv)
    products = (
        *(Product(tokens, h, n) for n in columns), Product(tokens, h, h),
        *(Product(tokens, h, model.mlp) for _ in range(2)), Product(tokens, model.mlp, h),
    )  # fmt: skip
    attention = Attention(rows * model.heads, model.context, h / model.heads)
    # Read and written per token, in bf16 (2) and float32 (4): nn.RMSNorm computes in float32 step by step (cast,
    # square, mean, two products); rotation in complex float32; keys and values repeated; the copy of the attention's
    # output; SiLU and its product; two sums of the residual.
    norms, rotation, repeated = 2 * 40.0 * h, 20.0 * (h + model.kv), 2 * 2.5 * h
    each = norms + rotation + repeated + 4.0 * h + 10.0 * model.mlp + 2 * 6.0 * h
    weights = model.layer_weights
    # FSDP: parameters are gathered as bf16, and copied out; gradients copied in, cast to float32 and scattered.
    gather, scatter = (
        Collective("all_gather", 2.0 * weights, "data"),
        Collective("reduce_scatter", 4.0 * weights, "data"),
    )
    forward = Pass(products, (attention,), each * tokens + 4.0 * weights, gathers=(gather,))
    again = Pass(products[1::2], (), each * tokens)  # every second product is recomputed, and all between
    backward = again + Pass(
        gradients_of(products), (replace(attention, backward=True),), 2.0 * each * tokens + 10.0 * weights,
        gathers=(gather,), scatters=(scatter,),
    )  # fmt: skip
    # The last layer stays gathered between its passes; embedding, last norm and head are one unit, which does, too.
    last = replace(backward, gathers=())
    layers = [Segment(f"layers.{i}", forward, backward if i < model.layers - 1 else last) for i in range(model.layers)]
    ends = 2.0 * model.vocab * h
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
    return Work((Segment("embed", table, table_back), *layers, head), 1, tokens, update_elements=parameters)


def with_rates(hardware: Hardware, **changes: float) -> Hardware:
    """Return a machine whose rates differ in some fields."""
    return replace(hardware, rates=tuple(replace(rates, **changes) for rates in hardware.rates))


def torchtitan_time(hardware: Hardware, ranks: int) -> StepTime:
    """Return the step of Llama 3.1 8B, two sequences of 8,192 tokens a GPU.

    On Meta's H100 with HBM2e: 2.4 TB/s, of which copies reach the same share as of HBM3's 3.35.
    """
    memory = hardware.rates_of("torch", "bf16").memory_bytes_per_second * 2.4 / 3.35
    hardware = with_rates(hardware, memory_bytes_per_second=memory, seconds_per_operation=0.0)
    work = torchtitan(LLAMA_8B, 2)
    # AdamW with foreach: 21 passes over vectors of float32, and 3 of clipping, instead of a fused kernel's 8.
    shard = work.update_elements / ranks
    work = replace(work, update_elements=shard, update_bytes=4.0 * (24 - 8) * shard)
    mesh = Mesh(ranks, 1, 1)
    computation = Computation(hardware, "torch", "bf16", hardware.ranks_per_node, ranks)
    return step_time([work], "1f1b", computation, Network(hardware, mesh))


def fitted(hardware: Hardware) -> Hardware:
    """Return ``hardware`` with the product efficiency that gives 5,762 tokens a second and GPU on 8 GPUs."""
    low, high = 0.1, 1.5
    for _ in range(60):
        efficiency = (low + high) / 2
        candidate = with_rates(hardware, product_efficiency=efficiency)
        low, high = (efficiency, high) if tokens_per_second(candidate, 8) < 5762 else (low, efficiency)
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


# --- Horovod on 512 P100, docs/benchmarks.rst and arXiv 1802.05799: tf_cnn_benchmarks, 64 images of a batch a GPU ---

# Parameters in millions and multiplications in billions of the layers, first to last.
VGG16 = (
    (0.002, 0.087), (0.037, 1.85), (0.074, 0.925), (0.148, 1.85), (0.295, 0.925), (0.59, 1.85), (0.59, 1.85),
    (1.18, 0.925), (2.36, 1.85), (2.36, 1.85), (2.36, 0.462), (2.36, 0.462), (2.36, 0.462), (102.76, 0.103),
    (16.78, 0.017), (4.1, 0.004),
)  # fmt: skip
INCEPTION_V3 = (
    (0.21, 1.35), (0.256, 0.314), (0.278, 0.34), (0.285, 0.349), (1.15, 0.402), (1.29, 0.373), (1.69, 0.488),
    (1.69, 0.488), (2.14, 0.618), (1.7, 0.29), (5.04, 0.322), (6.07, 0.388), (2.05, 0.002),
)  # fmt: skip
# Images a second of one P100 (DGX-1), tensorflow.org/performance/benchmarks, May 2017.
IMAGES = {"Inception V3": (INCEPTION_V3, 142.0, 0.90), "VGG-16": (VGG16, 154.0, 0.68)}


def horovod_work(layers: Sequence[tuple[float, float]], seconds: float) -> Work:
    """Return the work of a step of ``seconds``, a third of it forward; every layer is a bucket."""
    total = sum(multiplications for _, multiplications in layers)
    segments, buckets = [], []
    for index, (parameters, multiplications) in enumerate(layers):
        share = seconds * multiplications / total
        segments.append(Segment(f"layers.{index}", Pass(seconds=share / 3), Pass(seconds=2 * share / 3)))
        elements = 1e6 * parameters
        buckets.insert(0, Bucket(index, elements, (Collective("all_reduce", 4.0 * elements, "data"),)))
    return Work(tuple(segments), 1, buckets=tuple(buckets))


def horovod_efficiency(hardware: Hardware, name: str, ranks: int = 512) -> float:
    """Return images a second of ``ranks`` GPUs, divided by those of as many single ones."""
    layers, images, _ = IMAGES[name]
    seconds = 64 / images
    computation = Computation(hardware, "tensorflow", "fp32", hardware.ranks_per_node, ranks)
    time = step_time([horovod_work(layers, seconds)], "1f1b", computation, Network(hardware, Mesh(ranks, 1, 1)))
    return seconds / time.seconds
