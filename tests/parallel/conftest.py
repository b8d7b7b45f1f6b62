"""Every rank runs these tests: pytest is started by a launcher (see tests/test_launches.py)."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from hvdlm import plugins
from hvdlm.config import Config
from hvdlm.interfaces import World
from hvdlm.run import choose_backend
from hvdlm.topology import make_mesh

FRAMEWORK = os.environ.get("HVDLM_TEST_FRAMEWORK", "torch")


@pytest.fixture(scope="session")
def config() -> Config:
    """Return the configuration that the world is started with."""
    return Config(framework=FRAMEWORK)


@pytest.fixture(scope="session")
def world(config: Config) -> Iterator[World]:
    """Return this launch's world; with four ranks, it has groups along the axes of a 2 x 1 x 2 mesh as well."""
    name = choose_backend()
    assert name != "local", "start these tests under a launcher: see tests/test_launches.py"
    backend = plugins.make(plugins.load([name]), "backend", name)
    _, size, _, _ = backend.launch_shape()
    config.train.threads = backend.prepare(config)
    config.parallel.tensor = 2 if size == 4 else 1
    plugins.make(plugins.load([FRAMEWORK]), "framework", FRAMEWORK)
    world = backend.start(FRAMEWORK, make_mesh(size, config.parallel).groups(), config)
    yield world
    world.close()


@pytest.fixture(scope="session")
def tensor():
    """Return a function from numpy to the framework's tensor."""
    if FRAMEWORK == "torch":
        import torch

        return torch.from_numpy
    import tensorflow

    return tensorflow.constant
