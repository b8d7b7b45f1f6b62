"""Test harness of a rank: the world of a launch, one framework, and the plugins under test."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol

import numpy as np
import pluggy

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
from hvdlm_testing.plugin_under_test import PluginUnderTest

VOCAB, CONTEXT, ROWS = 64, 4, 4  # TensorFlow unrolls recurrent models: few positions keep the graph small
_NO_CONTRACTS = (object, Protocol, Generic)


class Skip(Exception):
    """Raised by a check that does not apply; carries the reason."""


def lacking(implementation: Any, *contracts: type) -> str:
    """Return the members of ``contracts`` (protocols) that an object lacks, as a phrase; empty if it has all."""
    bases = dict.fromkeys(base for contract in contracts for base in contract.__mro__ if base not in _NO_CONTRACTS)
    members = [name for base in reversed(bases) for name in {**vars(base).get("__annotations__", {}), **vars(base)}]
    missing = [name for name in dict.fromkeys(members) if name[0] != "_" and not hasattr(implementation, name)]
    return ", ".join(missing)


def location(error: Exception) -> str:
    """Return the file and the line where an exception was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}:{frame.lineno}"


@dataclass
class Findings:
    """Findings of a check: sentences about faults, and figures to compare with those of other frameworks."""

    faults: list[str] = field(default_factory=list)
    figures: list[float] = field(default_factory=list)

    def fault(self, sentence: str) -> None:
        """Add a sentence about a fault."""
        self.faults.append(sentence)

    def require(self, condition: Any, sentence: str) -> bool:
        """Add ``sentence`` as a fault unless ``condition`` holds; return whether it does."""
        if not condition:
            self.fault(sentence)
        return bool(condition)


@dataclass
class Harness:
    """The started world, a framework and the loaded plugins; ``base`` is the configuration of the world.

    ``checked``: what models were found to be in this launch, by their descriptions and configurations.
    """

    framework_name: str
    framework: Framework
    manager: pluggy.PluginManager
    world: World
    base: Config
    checked: dict[str, Findings] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def open(cls, framework: str, backend_name: str, tested: Sequence[PluginUnderTest]) -> Iterator[Harness]:
        """Start the world as a run does, with all plugins under test loaded; close it at the end of the context."""
        manager = plugins.load([framework, backend_name, "all_reduce", "compression", "local_sgd"])
        for plugin in tested:
            if plugin.implementation is not None and not manager.has_plugin(plugin.name):
                manager.register(plugin.implementation, plugin.name)
        config = Config(framework=framework, backend=backend_name)
        config.communication.timeout = 120.0
        backend = plugins.make(manager, "backend", backend_name)
        size = backend.launch_shape()[1]
        config.train.threads = backend.prepare(config)
        manager.hook.hvdlm_prepare(config=config)
        built = plugins.make(manager, "framework", framework)
        world = backend.start(built, make_mesh(size, config.parallel).groups(), config)
        try:
            yield cls(framework, built, manager, world, config)
        finally:
            world.close()

    def config(self, plugin: PluginUnderTest | None = None) -> Config:
        """Return a plugin's own configuration if it is a task or has a file of options, else that of a small run.

        Models are small, too, where no file says otherwise.
        """
        if plugin is not None and (plugin.config or plugin.provides("hvdlm_make_task")):
            config = plugin.run_config()
            config.framework, config.backend = self.framework_name, self.base.backend
            config.train.threads = self.base.train.threads
            if not plugin.config:
                _make_small(config)
            return config
        config = copy.deepcopy(self.base)
        train = config.train
        _make_small(config)
        config.data.context, train.batch_size, train.steps, train.seed = CONTEXT, ROWS * self.world.size, 8, 3
        config.communication.compression.min_elements, config.communication.local.steps = 1, 2
        return config

    @property
    def group(self) -> Group:
        """The group of all ranks, which is that of the data axis."""
        return self.world.group(tuple(range(self.world.size)))

    def exchange(self, config: Config) -> Exchange:
        """Return the exchange that ``config`` names."""
        return plugins.make_exchange(self.manager, config, self.world, self.group)

    def build(self, spec: ModelSpec, config: Config) -> tuple[Trainable, Exchange]:
        """Return a model with its initial values, and its exchange."""
        exchange = self.exchange(config)
        mesh = make_mesh(self.world.size, config.parallel)
        optimizer = plugins.find_optimizer(self.manager, config.train)
        own = {"optimizer": optimizer} if optimizer else {}
        return self.framework.build(spec, mesh, self.world, exchange, config, **own), exchange

    def batch(self, spec: ModelSpec, config: Config) -> Batch:
        """Return this rank's rows of a batch; ranks have different rows and different numbers of targets that count."""
        random = np.random.default_rng(5)
        rows, time = config.train.batch_size, config.data.context
        tokens = random.integers(0, min(spec.settings.vocab, 16), (rows, time + 1)).astype(np.int32)
        weights = np.ones((rows, time), np.float32)
        weights[0, time // 2 :] = 0.0
        count = rows // self.world.size
        first = self.world.rank * count
        return Batch(tokens[:, :-1], tokens[:, 1:], weights, True).rows(first, first + count)


def _make_small(config: Config) -> None:
    model = config.model
    model.layers, model.width, model.heads = 1, 32, 2
