"""A rank that trains a GPT as a careful user of PyTorch writes it, without hvdlm, until it is killed.

Model and loop are those of nanoGPT (github.com/karpathy/nanoGPT): a module per layer, query, key and value as one
linear layer, fused AdamW, clipping by the global norm; with more than one rank, DistributedDataParallel over Gloo.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from steady_worker import Counter
from torch import nn

from hvdlm.config import Config, ModelConfig, ParallelConfig
from hvdlm.io.launcher_env import launch_shape
from hvdlm.parallel.mesh import Mesh
from hvdlm.parallel.sharding_rules import make_model_shard
from hvdlm_backends.local import AloneGroup
from hvdlm_language.presets import PRESETS
from hvdlm_torch.collectives import Collectives
from hvdlm_torch.models import make_model


class Block(nn.Module):
    """A layer: attention and MLP, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.joined = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``[rows, time, width]`` of ``x``."""
        rows, time, width = x.shape
        q, k, v = self.joined(self.attention_norm(x)).split(width, dim=2)
        q, k, v = (t.view(rows, time, self.heads, -1).transpose(1, 2) for t in (q, k, v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(a.transpose(1, 2).contiguous().view(rows, time, width))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class NanoGPT(nn.Module):
    """A GPT whose embedding is its head, too."""

    def __init__(self, c: ModelConfig, vocab: int, context: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, c.width)
        self.positions = nn.Embedding(context, c.width)
        self.blocks = nn.ModuleList(Block(c.width, c.heads) for _ in range(c.layers))
        self.norm = nn.LayerNorm(c.width, bias=False)

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean loss in nats of ``targets`` after ``inputs``, both ``[rows, time]``."""
        x = self.tokens(inputs) + self.positions(torch.arange(inputs.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))

    @torch.no_grad()
    def load(self, values: Mapping[str, torch.Tensor]) -> None:
        """Take the values of hvdlm's parameters."""
        self.tokens.weight.copy_(values["embed.tokens"])
        self.positions.weight.copy_(values["embed.positions"])
        self.norm.weight.copy_(values["final_norm.scale"])
        for number, block in enumerate(self.blocks):
            p = {name.split(".", 2)[2]: t for name, t in values.items() if name.startswith(f"layers.{number}.")}
            joined = [p[f"attention.{name}.weight"].t() for name in ("query", "key", "value")]
            block.joined.weight.copy_(torch.cat(joined))
            for name, layer in (("attention.output", block.output), ("mlp.up", block.up), ("mlp.down", block.down)):
                layer.weight.copy_(p[f"{name}.weight"].t())
            block.attention_norm.weight.copy_(p["attention_norm.scale"])
            block.mlp_norm.weight.copy_(p["mlp_norm.scale"])


def initialize(model: NanoGPT, config: Config, inputs: torch.Tensor, targets: torch.Tensor) -> None:
    """Give ``model`` hvdlm's initial values, and check that both compute the same loss."""
    spec = PRESETS["gpt"](config.model, model.tokens.num_embeddings, config.data.context)
    values = {p.name: torch.from_numpy(p.initial(config.train.seed)) for p in spec.params}
    model.load(values)
    layout = make_model_shard(spec, Mesh(1, 1, 1), 0, ParallelConfig())
    other = make_model(spec, layout, Collectives(AloneGroup(), layout))
    other.bind(values)
    with torch.no_grad():
        hidden, _ = other.hidden(inputs, None, None, True, False)
        loss = F.cross_entropy(other.scores(hidden).flatten(0, 1), targets.flatten()).item()
        if abs(loss - model(inputs, targets).item()) > 1e-4:
            raise RuntimeError("the models differ: they compute different losses")


def optimizer_of(model: nn.Module, c: Config) -> torch.optim.AdamW:
    """Return AdamW with weight decay on the matrices."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": c.train.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, c.train.learning_rate, (c.train.beta1, c.train.beta2), fused=True)


def main() -> None:
    """Train until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path)
    for name in ("rows", "threads", "vocab"):
        parser.add_argument(f"--{name}", type=int)
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    rank, ranks = launch_shape()[:2]
    config = Config()
    config.model.bias = False
    context, random = config.data.context, np.random.default_rng(rank)
    tokens = random.integers(0, o.vocab, 1_000_000).astype(np.uint16)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        starts = random.integers(0, len(tokens) - context - 1, o.rows // ranks)
        windows = torch.from_numpy(np.stack([tokens[s : s + context + 1] for s in starts]).astype(np.int64))
        return windows[:, :-1], windows[:, 1:]

    model: nn.Module = NanoGPT(config.model, o.vocab, context)
    initialize(model, config, *batch())
    if ranks > 1:
        store = f"file://{o.folder}/rendezvous"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer, counter, step = optimizer_of(model, config), Counter(o.folder / f"count-{rank}"), 0
    while True:
        for group in optimizer.param_groups:
            group["lr"] = 1e-4 + 4.5e-4 * (1 + math.cos(math.pi * min(1.0, step / 1000)))
        loss = model(*batch())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip)
        optimizer.step()
        step += 1
        if step % 10 == 0:
            loss.item()
        counter.hvdlm_step_ended(step)


if __name__ == "__main__":
    main()
