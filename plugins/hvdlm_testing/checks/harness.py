"""Where checks take place: the ranks of a launch, one framework, and the plugins under test."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pluggy
from hvdlm_testing.plugin_under_test import Subject

from hvdlm import plugins
from hvdlm.config import Config
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.mesh import make_mesh
from hvdlm.protocols.exchange import Exchange
from hvdlm.protocols.framework import Framework
from hvdlm.protocols.group import Group
from hvdlm.protocols.trainable import Trainable
from hvdlm.protocols.types import Batch
from hvdlm.protocols.world import World

VOCAB, CONTEXT, ROWS = 64, 8, 4


class Skip(Exception):
    """Why something is not looked at."""


@dataclass
class Checked:
    """What a check found: sentences about faults, and figures to be compared with another framework's."""

    faults: list[str] = field(default_factory=list)
    figures: list[float] = field(default_factory=list)

    def fault(self, sentence: str) -> None:
        """Add a fault."""
        self.faults.append(sentence)

    def require(self, good: Any, sentence: str) -> bool:
        """Add ``sentence`` as a fault unless ``good``; return whether it is."""
        if not good:
            self.fault(sentence)
        return bool(good)


@dataclass
class Stage:
    """The ranks of a launch."""

    framework_name: str
    framework: Framework
    manager: pluggy.PluginManager
    world: World
    base: Config

    @classmethod
    @contextmanager
    def open(cls, framework: str, backend_name: str, subjects: Sequence[Subject]) -> Iterator[Stage]:
        """Meet the other ranks, as a run does, with all plugins under test loaded."""
        manager = plugins.load([framework, backend_name, "all_reduce", "compression"])
        for subject in subjects:
            if subject.plugin is not None and not manager.has_plugin(subject.name):
                manager.register(subject.plugin, subject.name)
        config = Config(framework=framework, backend=backend_name)
        config.communication.timeout = 120.0
        backend = plugins.make(manager, "backend", backend_name)
        size = backend.launch_shape()[1]
        config.train.threads = backend.prepare(config)
        manager.hook.hvdlm_prepare(config=config)
        made = plugins.make(manager, "framework", framework)
        world = backend.start(made, make_mesh(size, config.parallel).groups(), config)
        try:
            yield cls(framework, made, manager, world, config)
        finally:
            world.close()

    def config(self, subject: Subject | None = None) -> Config:
        """Return the configuration of a small run, or that which a plugin is tested with."""
        if subject is not None and (subject.config or subject.provides("hvdlm_make_task")):
            found = subject.run_config()
            found.framework, found.backend = self.framework_name, self.base.backend
            found.train.threads = self.base.train.threads
            return found
        found = copy.deepcopy(self.base)
        model, train = found.model, found.train
        model.layers, model.width, model.heads = 1, 32, 2
        found.data.context, train.batch_size, train.steps, train.seed = CONTEXT, ROWS * self.world.size, 8, 3
        found.communication.compression.min_elements, found.communication.local.steps = 1, 2
        return found

    @property
    def group(self) -> Group:
        """All ranks: the data axis."""
        return self.world.group(tuple(range(self.world.size)))

    def exchange(self, config: Config) -> Exchange:
        """Return the exchange that ``config`` asks for."""
        more = {"compressors": plugins.compressors(self.manager), "index": self.world.rank}
        name = config.communication.exchange
        return plugins.make(self.manager, "exchange", name, group=self.group, config=config, **more)

    def build(self, spec: ModelSpec, config: Config) -> tuple[Trainable, Exchange]:
        """Return a model at its initial values, and the exchange that it was given."""
        exchange = self.exchange(config)
        mesh = make_mesh(self.world.size, config.parallel)
        return self.framework.build(spec, mesh, self.world, exchange, config), exchange

    def batch(self, spec: ModelSpec, config: Config) -> Batch:
        """Return this rank's rows of a batch; the ranks' differ, and not equally many targets of them count."""
        random = np.random.default_rng(5)
        rows, time = config.train.batch_size, config.data.context
        tokens = random.integers(0, min(spec.settings.vocab, 16), (rows, time + 1)).astype(np.int32)
        weights = np.ones((rows, time), np.float32)
        weights[0, time // 2 :] = 0.0
        share = rows // self.world.size
        return Batch(tokens[:, :-1], tokens[:, 1:], weights, True).rows(
            self.world.rank * share, (self.world.rank + 1) * share
        )
