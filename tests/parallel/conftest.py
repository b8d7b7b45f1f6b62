"""Tests that run on every rank: a launcher starts pytest (see tests/test_launches.py)."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from builders import meshes
from hvdlm import plugins
from hvdlm.config import Config
from hvdlm.configuration.availability import choose_backend
from hvdlm.protocols.world import World
from launching import FRAMEWORK


@pytest.fixture(scope="session")
def config() -> Config:
    """Return the configuration that the world is started with."""
    return Config(framework=FRAMEWORK)


@pytest.fixture(scope="session")
def world(config: Config) -> Iterator[World]:
    """Yield the world of this launch, with the groups of every mesh of its size."""
    name = os.environ.get("HVDLM_TEST_BACKEND") or choose_backend(FRAMEWORK)
    assert name != "local", "start these tests under a launcher: see tests/test_launches.py"
    backend = plugins.make(plugins.load([name]), "backend", name)
    _, size, _, _ = backend.launch_shape()
    config.train.threads = backend.prepare(config)
    groups = {ranks: None for mesh in meshes(size) for ranks in mesh.groups()}
    manager = plugins.load([FRAMEWORK])
    manager.hook.hvdlm_prepare(config=config)
    framework = plugins.make(manager, "framework", FRAMEWORK)
    world = backend.start(framework, list(groups), config)
    yield world
    world.close()


@pytest.fixture(scope="session")
def tensor():
    """Return a function from numpy to the framework's tensor."""
    if FRAMEWORK == "torch":
        import torch

        return torch.from_numpy
    if FRAMEWORK == "tensorflow":
        import tensorflow

        return tensorflow.constant
    return plugins.make(plugins.load([FRAMEWORK]), "framework", FRAMEWORK).tensor


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Exit at the first failure, so that the launcher ends the other ranks, which would wait in collectives."""
    if report.failed:
        print(report.nodeid, report.longreprtext, flush=True)
        os._exit(1)
