"""One rank that trains the same model in one layout after the other, a block of steps each, in turns."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

from hvdlm import plugins
from hvdlm.config import Config, ModelConfig, ParallelConfig
from hvdlm.configuration.availability import choose_backend
from hvdlm.models.spec import builtin_models
from hvdlm.parallel.mesh import Mesh

BLOCK = 3


def configured(o: argparse.Namespace, mesh: Mesh) -> Config:
    """Return the configuration of ``mesh``; a data rank's rows are one micro-batch unless there are stages."""
    config = Config(framework=o.framework, model=ModelConfig(layers=o.layers, width=o.width, heads=8, bias=False))
    config.data.context = o.context
    config.train.batch_size, config.train.threads = o.rows, 1
    config.train.micro_batch_size = o.rows // mesh.data // o.micro_batches if mesh.pipeline > 1 else None
    config.parallel = ParallelConfig(*mesh.shape)
    return config


class Layout:
    """A trainable and what its steps took."""

    def __init__(self, world: Any, manager: Any, o: argparse.Namespace, shape: str) -> None:
        self.mesh = Mesh(*map(int, shape.split("x")))
        self.config = configured(o, self.mesh)
        self.spec = builtin_models()["gpt"](self.config.model, o.vocab, o.context)
        group = world.group(self.mesh.group("data", world.rank))
        more: dict[str, Any] = {"compressors": {}, "index": group.ranks.index(world.rank)}
        exchange = plugins.make(manager, "exchange", "all_reduce", group=group, config=self.config, **more)
        framework = plugins.make(manager, "framework", o.framework)
        self.trainable = framework.build(self.spec, self.mesh, world, exchange, self.config)
        self.rank, self.seconds, self.idle, self.bytes = world.rank, [], [], {}

    def block(self, batch: Any) -> float:
        """Do a block of steps; return its seconds."""
        rows = len(batch.inputs) // self.mesh.data
        first = self.mesh.coordinates(self.rank)["data"] * rows
        size = self.config.train.micro_batch_size or rows
        parts = [batch.rows(i, i + size) for i in range(first, first + rows, size)]
        began, idle = time.perf_counter(), 0.0
        for step in range(BLOCK):
            result = self.trainable.train_step(parts, 1e-4, step)
            idle += result.idle_seconds
        seconds = time.perf_counter() - began
        self.seconds.append(seconds / BLOCK)
        self.idle.append(idle / seconds)
        self.bytes = result.axis_bytes
        return seconds


def main() -> None:
    """Print every round's seconds per layout, and what each layout holds and moves."""
    import numpy as np

    from hvdlm.protocols.types import Batch

    parser = argparse.ArgumentParser()
    parser.add_argument("--framework")
    parser.add_argument("--layouts")
    for name in ("width", "layers", "context", "rows", "micro_batches", "rounds"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--vocab", type=int, default=96)
    o = parser.parse_args()
    shapes = o.layouts.split(",")
    config = configured(o, Mesh(*map(int, shapes[0].split("x"))))
    name = choose_backend(o.framework)
    manager = plugins.load([o.framework, name, "all_reduce"])
    backend = plugins.make(manager, "backend", name)
    backend.prepare(config)
    manager.hook.hvdlm_prepare(config=config)
    framework = plugins.make(manager, "framework", o.framework)
    groups = {ranks: None for shape in shapes for ranks in Mesh(*map(int, shape.split("x"))).groups()}
    world = backend.start(framework, list(groups), config)
    layouts = [Layout(world, manager, o, shape) for shape in shapes]
    tokens = np.random.default_rng(0).integers(0, o.vocab, (o.rows, o.context + 1)).astype(np.int32)
    batch = Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), None, True)
    rounds = []
    for _ in range(o.rounds + 1):
        rounds.append([layout.block(batch) for layout in layouts])
        world.gather_objects(0)
    told = []
    for shape, layout in zip(shapes, layouts, strict=True):
        mine = [layout.trainable.memory(), layout.bytes, statistics.median(layout.idle[1:])]
        everyone = world.gather_objects(mine)
        told.append(
            {
                "layout": shape,
                "tokens_per_second": o.rows * o.context / statistics.median(layout.seconds[1:]),
                "memory": max(sum(rank[0].values()) for rank in everyone),
                "parameters": max(rank[0]["parameters"] for rank in everyone),
                "bytes": max(sum(rank[1].values()) for rank in everyone),
                "idle_share": statistics.mean(rank[2] for rank in everyone),
            }
        )
    if world.rank == 0:
        print("ROUNDS " + json.dumps(rounds[1:]), flush=True)
        print("LAYOUTS " + json.dumps(told), flush=True)
    world.close()


if __name__ == "__main__":
    main()
