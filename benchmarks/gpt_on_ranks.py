"""A GPT in training on the ranks of a launch, for benchmarks in which several of them take turns in one process."""

from __future__ import annotations

import argparse
from typing import Any, Literal

VOCAB = 96


def build_gpt(
    backend_name: str,
    o: argparse.Namespace,
    leaf: int | None = None,
    reduction: Literal["average", "exact"] = "average",
) -> tuple[Any, Any]:
    """Return the world of this launch over a backend, and a GPT that trains on it with one thread a rank.

    ``o`` has the framework, ``layers``, ``width``, ``context`` and the ``rows`` of a global batch. ``leaf``: rows of a
    micro-batch; None: all of a rank.
    """
    from hvdlm import plugins
    from hvdlm.config import Config, ModelConfig
    from hvdlm.parallel.mesh import make_mesh
    from hvdlm_language.presets import PRESETS

    framework_name = o.frameworks[0]
    config = Config(framework=framework_name, backend=backend_name)
    config.model = ModelConfig(layers=o.layers, width=o.width, heads=6, bias=False)
    config.data.context = o.context
    config.train.batch_size, config.train.micro_batch_size, config.train.threads = o.rows, leaf, 1
    config.communication.reduction = reduction
    names = [framework_name, backend_name, "all_reduce"]
    manager = plugins.load([*names, "exact"] if reduction == "exact" else names)
    backend = plugins.make(manager, "backend", backend_name)
    backend.prepare(config)
    manager.hook.hvdlm_prepare(config=config)
    framework = plugins.make(manager, "framework", framework_name)
    mesh = make_mesh(backend.launch_shape()[1], config.parallel)
    world = backend.start(framework, mesh.groups(), config)
    group = world.group(mesh.group("data", world.rank))
    exchange = plugins.make_exchange(manager, config, world, group)
    spec = PRESETS["gpt"](config.model, VOCAB, o.context)
    return world, framework.build(spec, mesh, world, exchange, config)
