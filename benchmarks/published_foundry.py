"""MosaicML's llm-foundry, scripts/train/benchmarking/README.md: MPT models in FSDP, on 8 A100 and on more GPUs."""

from __future__ import annotations

import numpy as np
import published_systems
from published_systems import Transformer

from hvdlm.planning.hardware import Hardware
from hvdlm.planning.rates import slowest_of

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


# --- Speeds on 8 A100 80 GB, without activation checkpointing ---

# By billions of parameters: layers, width, heads; sequences of a micro-batch, micro-batches; tokens a second and GPU.
MPT = {
    13: (40, 5120, 40, 2, 3, 2262),
    7: (32, 4096, 32, 6, 2, 4641),
    3: (32, 2560, 20, 10, 2, 10811),
    1: (24, 2048, 16, 14, 4, 20513),
}


# The same on 8 H100, with one micro-batch of as many sequences.
MPT_H100 = {13: 4792, 7: 10643, 1: 45455}


def tokens_per_second(hardware: Hardware, billions: int, micro_batches: int | None = None) -> float:
    """Return the predicted tokens a second and GPU of a model with 2,048 positions."""
    layers, width, heads, rows, several, _ = MPT[billions]
    micro_batches = micro_batches or several
    model = Transformer(layers, width, heads, 4 * width, 50368, 2048, width, tied=True)
    # Per token in bf16: two norms, the copy of the attention's output, GELU, two sums of the residual.
    each = 2 * 4.0 * width + 4.0 * width + 4.0 * model.mlp + 2 * 6.0 * width
    work = published_systems.fsdp(model, rows, each, recomputed=False, micro_batches=micro_batches)
    time = published_systems.fsdp_time(published_systems.with_rates(hardware, seconds_per_operation=0.0), work, 8)
    return micro_batches * rows * model.context / time.seconds


def fitted(hardware: Hardware) -> Hardware:
    """Return ``hardware`` with the product efficiency that gives the speed of the model with 7 billion parameters."""
    return published_systems.fit(hardware, lambda candidate: tokens_per_second(candidate, 7), MPT[7][-1])
