"""A rank that trains the same model in several layouts, a block of steps each in turns.

``1x1x2c``: compiled; ``1x1x2s``: with sequence parallelism; ``1x1x2w``: waits for the sum of an input's gradient before
it computes those of weights; ``1x2x1v2``: with two virtual stages a rank.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from typing import Any

from harness import emit

from hvdlm import plugins
from hvdlm.config import Config, ModelConfig, ParallelConfig
from hvdlm.configuration.availability import choose_backend
from hvdlm.parallel.mesh import Mesh
from hvdlm_language.presets import PRESETS

BLOCK = 3


def make_config(o: argparse.Namespace, shape: str) -> Config:
    """Return the configuration of a layout; without pipeline stages, a data rank's rows are one micro-batch."""
    mesh = make_mesh(shape)
    model = ModelConfig(layers=o.layers, width=o.width, heads=8, bias=False)
    config = Config(framework=o.framework, model=model)
    config.data.context = o.context
    config.train.batch_size = o.rows
    config.train.threads = 1
    config.train.compile = "c" in shape
    if mesh.pipeline > 1:
        config.train.micro_batch_size = o.rows // mesh.data // o.micro_batches
    virtual = int(shape.partition("v")[2] or 1)
    config.parallel = ParallelConfig(*mesh.shape, sequence="s" in shape, virtual_stages=virtual)
    return config


def make_mesh(shape: str) -> Mesh:
    """Return the mesh that is written as 2x1x1, 2x1x1c or 1x2x1v2: data x pipeline x tensor."""
    return Mesh(*map(int, shape.partition("v")[0].rstrip("csw").split("x")))


def wait_for_sums(collectives: Any, framework: str) -> None:
    """Have column-parallel products wait for the sum of their input's gradient before anything else is computed."""
    if framework == "torch":
        collectives._overlaps = lambda x: False
        return
    from hvdlm_tensorflow.collectives import linear

    def columns(x: Any, weights: Any, biases: Any, name: str) -> list[Any]:
        entered = collectives.enter(x, name)
        return [linear(entered, weight) for weight in weights]  # without biases

    collectives.columns = columns
    collectives.scores = lambda x, table, bias=None, name="head": linear(collectives.enter(x, name), table, True)


def choose_compiler(framework: str, name: str) -> None:
    """Let this process compile PyTorch's steps with the backend ``name`` of torch.compile."""
    if framework == "torch":
        import torch

        torch.compile = partial(torch.compile, backend=name)


class Layout:
    """The model in one layout, and measurements of its blocks of steps."""

    def __init__(self, world: Any, manager: Any, o: argparse.Namespace, shape: str) -> None:
        self.shape = shape
        self.mesh = make_mesh(shape)
        self.config = make_config(o, shape)
        spec = PRESETS["gpt"](self.config.model, o.vocab, o.context)
        group = world.group(self.mesh.group("data", world.rank))
        exchange = plugins.make_exchange(manager, self.config, world, group)
        framework = plugins.make(manager, "framework", o.framework)
        self.trainable = framework.build(spec, self.mesh, world, exchange, self.config)
        if "w" in shape:
            wait_for_sums(self.trainable._forward.collectives, o.framework)
        self.rank = world.rank
        self.seconds: list[float] = []  # of a step, by block
        self.idle: list[float] = []  # share of the time, by block
        self.bytes: dict[str, int] = {}  # moved in a step, by mesh axis

    def block(self, batch: Any) -> float:
        """Do a block of steps; return its seconds."""
        rows = len(batch.inputs) // self.mesh.data
        first = self.mesh.coordinates(self.rank)["data"] * rows
        size = self.config.train.micro_batch_size or rows
        micro_batches = [batch.rows(start, start + size) for start in range(first, first + rows, size)]
        began, idle = time.perf_counter(), 0.0
        for step in range(BLOCK):
            result = self.trainable.train_step(micro_batches, 1e-4, step)
            idle += result.idle_seconds
        seconds = time.perf_counter() - began
        self.seconds.append(seconds / BLOCK)
        self.idle.append(idle / seconds)
        self.bytes = result.axis_bytes
        return seconds

    def measurements(self, world: Any, tokens: int) -> dict[str, Any]:
        """Return the measurements of all blocks but the first; memory and bytes are those of the rank with most."""
        measured = (self.trainable.memory(), self.bytes, statistics.median(self.idle[1:]))
        memory, axis_bytes, idle = zip(*world.gather_objects(measured), strict=True)
        return {
            "layout": self.shape,
            "tokens_per_second": tokens / statistics.median(self.seconds[1:]),
            "memory": max(sum(kinds.values()) for kinds in memory),
            "parameters": max(kinds["parameters"] for kinds in memory),
            "bytes": max(sum(axes.values()) for axes in axis_bytes),
            "idle_share": statistics.mean(idle),
        }


def main() -> None:
    """Train in turns; rank 0 emits the seconds of each round's blocks, and the measurements of each layout."""
    import numpy as np

    from hvdlm.protocols.types import Batch

    parser = argparse.ArgumentParser()
    parser.add_argument("--framework")
    parser.add_argument("--layouts")
    for name in ("width", "layers", "context", "rows", "micro_batches", "rounds"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--vocab", type=int, default=96)
    parser.add_argument("--compiler", default="inductor")
    o = parser.parse_args()
    choose_compiler(o.framework, o.compiler)
    shapes = o.layouts.split(",")
    config = make_config(o, shapes[0])
    backend_name = choose_backend(o.framework)
    manager = plugins.load([o.framework, backend_name, "all_reduce"])
    backend = plugins.make(manager, "backend", backend_name)
    backend.prepare(config)
    manager.hook.hvdlm_prepare(config=config)
    framework = plugins.make(manager, "framework", o.framework)
    groups = {ranks: None for shape in shapes for ranks in make_mesh(shape).groups()}
    world = backend.start(framework, list(groups), config)
    layouts = [Layout(world, manager, o, shape) for shape in shapes]
    tokens = np.random.default_rng(0).integers(0, o.vocab, (o.rows, o.context + 1)).astype(np.int32)
    batch = Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), None, True)
    rounds = []
    for _ in range(o.rounds + 1):
        rounds.append([layout.block(batch) for layout in layouts])
        world.gather_objects(0)
    measurements = [layout.measurements(world, o.rows * o.context) for layout in layouts]
    if world.rank == 0:
        emit("rounds", rounds[1:])
        emit("layouts", measurements)
    world.close()


if __name__ == "__main__":
    main()
