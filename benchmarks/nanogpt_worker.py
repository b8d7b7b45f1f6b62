"""A rank that trains a GPT as a careful user of PyTorch writes it, without hvdlm, until it is killed.

Model and loop are those of nanoGPT (plain_gpt.py); with more than one rank, DistributedDataParallel over Gloo.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from plain_gpt import PlainLoop, Settings, Sizes
from steady_worker import Counter
from torch import nn

from hvdlm.config import Config, ParallelConfig
from hvdlm.io.launcher_env import launch_shape
from hvdlm.parallel.mesh import Mesh
from hvdlm.parallel.sharding_rules import make_model_shard
from hvdlm_backends.local import AloneGroup
from hvdlm_language.presets import PRESETS
from hvdlm_torch.collectives import Collectives
from hvdlm_torch.models import make_model


def initialize(loop: PlainLoop, config: Config) -> None:
    """Give the model of ``loop`` hvdlm's initial values, and check that both compute the same loss."""
    spec = PRESETS["gpt"](config.model, loop.model.sizes.vocab, config.data.context)
    values = {p.name: torch.from_numpy(p.initial(config.train.seed)) for p in spec.params}
    loop.model.copy_from(values)
    layout = make_model_shard(spec, Mesh(1, 1, 1), 0, ParallelConfig())
    other = make_model(spec, layout, Collectives(AloneGroup(), layout))
    other.bind(values)
    inputs, targets = loop.draw()
    with torch.no_grad():
        hidden, _ = other.hidden(inputs, None, None, True, False)
        loss = F.cross_entropy(other.scores(hidden).flatten(0, 1), targets.flatten()).item()
        if abs(loss - loop.model(inputs, targets).item()) > 1e-4:
            raise RuntimeError("the models differ: they compute different losses")


def main() -> None:
    """Train until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path)
    for name in ("rows", "threads", "vocab", "layers", "width"):
        parser.add_argument(f"--{name}", type=int)
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    rank, ranks = launch_shape()[:2]

    def wrap(model: nn.Module) -> nn.Module:
        if ranks == 1:
            return model
        store = f"file://{o.folder}/rendezvous"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
        return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)

    config = Config()
    config.model.layers, config.model.width, config.model.bias = o.layers, o.width, False
    m, t = config.model, config.train
    tokens = np.random.default_rng(rank).integers(0, o.vocab, 1_000_000).astype(np.uint16)
    rates = {"learning_rate": 1e-3, "weight_decay": t.weight_decay, "betas": (t.beta1, t.beta2)}
    settings = Settings(o.rows // ranks, bf16=False, clip=t.clip, **rates)
    sizes = Sizes(m.layers, m.width, m.heads, config.data.context, o.vocab)
    loop, counter = PlainLoop(sizes, settings, tokens, wrap=wrap, seed=rank), Counter(o.folder / f"count-{rank}")
    initialize(loop, config)
    while True:
        loop.step()
        counter.hvdlm_step_ended(loop.steps)


if __name__ == "__main__":
    main()
