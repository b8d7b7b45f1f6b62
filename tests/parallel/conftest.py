"""Tests that run on every rank, of which test_launches.py starts pytest: processes, or threads of one process.

``HVDLM_TEST_BACKEND=threads`` calls every test in a thread for each of ``HVDLM_TEST_RANKS`` ranks.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from builders import context_meshes, meshes
from hvdlm import plugins
from hvdlm.config import Config
from hvdlm.configuration.availability import choose_backend
from hvdlm.io import rank_context
from hvdlm.parallel.mesh import Mesh
from hvdlm.protocols.world import World
from launching import BACKEND, FRAMEWORK, RANKS

# What exchanges compute from collectives, which is the same on every transport.
EQUATIONS = ("test_compression.py", "test_zero_compression.py", "test_streaming.py")
# Tests of these files that other tests compare, or that have cases of their own for two ranks.
OF_TWO_RANKS = (
    "test_losses_of_every_exchange_are_written_and_fall",
    "test_training_and_its_restored_state_follow_the_plan",
)


CURVE_OF_STAGES = "test_virtual_stages_follow_the_curve_of_one_rank"
AVERAGES, MUON = "test_a_layout_averages_as_one_rank", "test_a_layout_follows_one_rank"
# What processes run of files that threads run as a whole, by the beginnings of the tests' names: layouts whose
# collectives are under way in an order of their own. TensorFlow's collectives are the same operations in all layouts.
OF_PROCESSES: dict[str, tuple[str, ...]] = {
    "test_context.py": ("test_context_ranks_follow", "test_attention_over_ranks"),
    "test_virtual_stages.py": (f"{CURVE_OF_STAGES}[tied]", f"{CURVE_OF_STAGES}[data-zero1]"),
    "test_gathered_layers.py": (
        "test_losses_and_norms_follow_one_rank[gpt]",
        "test_tensor_ranks_gather_their_shards_of_layers[sequence]",
        "test_evaluation_and_generation",
    ),
    "test_document_masks.py": ("test_packed_documents_have_the_gradients_of_each_alone[1x2x1]",),
    "test_moving_average.py": tuple(
        f"{AVERAGES}[{case}" for case in ("2x1x1-zero2-zero_gather", "2x1x1-zero3", "1x2x1")
    ),
    "test_muon.py": tuple(f"{MUON}[{case}-" for case in ("shape1", "shape3", "shape6")),
}
IN_TENSORFLOW: dict[str, tuple[str, ...]] = {
    "test_virtual_stages.py": (),
    "test_gathered_layers.py": ("test_",),  # by no other launch
    "test_document_masks.py": (),
    "test_moving_average.py": (f"{AVERAGES}[2x1x1-zero1-zero_gatherbf16",),
    "test_muon.py": (f"{MUON}[shape0-1",),
}
# What threads leave to the same framework's threads on another number of ranks, or to its processes, by parts of names:
# what a test computes with two ranks of an axis is traced alike with four.
ELSEWHERE: dict[tuple[str, int], dict[str, tuple[str, ...]]] = {
    ("tensorflow", 2): {
        "test_compression.py": ("continues_it[zero_one_adam]",),  # a run does (tests/test_train.py)
        "test_context.py": ("test_activations_shrink",),
        "test_document_masks.py": ("[sequence-recomputed]",),
        "test_moving_average.py": IN_TENSORFLOW["test_moving_average.py"],
        "test_muon.py": IN_TENSORFLOW["test_muon.py"],
    },
    ("tensorflow", 4): {
        "test_context.py": ("test_checkpoints", "test_evaluation", "test_bf16"),
        "test_document_masks.py": ("[exact]", "[sequence]"),
        "test_layouts.py": ("test_a_batch_of_texts_equals_one_rank",),
        "test_virtual_stages.py": ("test_evaluation_and_texts_equal_one_rank",),
    },
    ("torch", 2): {
        "test_context.py": ("[llama-zero2]", "[qwen3-recomputed]", "[neox-zero1]", "[muon-zero1]", "compressed_sums"),
    },
}


def covered_by(file: str, test: str, name: str) -> str:
    """Return which tests of other launches run the same code as this one in this launch; "" if none do.

    ``test``: the function's name; ``name``: with the case in brackets.
    """
    launch = (FRAMEWORK, RANKS, BACKEND)
    cases = (OF_PROCESSES | (IN_TENSORFLOW if FRAMEWORK == "tensorflow" else {})).get(file)
    if BACKEND != "threads" and cases is not None and not name.startswith(cases):
        return "ranks in threads, and the layouts that processes train over every transport"
    elsewhere = ELSEWHERE.get((FRAMEWORK, RANKS), {}).get(file, ())
    if BACKEND == "threads" and any(text in name for text in elsewhere):
        return "this framework's threads on another number of ranks, its processes, or its runs"
    if launch == ("torch", 2, "threads") and test not in OF_TWO_RANKS:
        if file in EQUATIONS:
            return "four ranks in threads, and two of TensorFlow"
        if file == "test_update_equations.py":
            return "four ranks in threads, whose layouts have the same axes"
    if launch == ("torch", 4, "threads") and test == OF_TWO_RANKS[1]:
        return "two ranks, and the sums of four"
    if launch == ("tensorflow", 2, "threads"):
        if file == "test_update_equations.py":
            return "two processes, and four ranks in threads"
        if test == "test_losses_of_every_exchange_are_written_and_fall":
            return "two processes, and PyTorch in threads"
    if launch == ("tensorflow", 4, "threads") and file in EQUATIONS:
        return "two ranks in threads, and four of PyTorch"
    if launch == ("tensorflow", 4, "threads") and file == "test_two_level.py":
        return "four processes, and PyTorch in threads"
    gathering = ("torch", 4, "threads"), ("torch", 4, ""), ("tensorflow", 2, "")
    if file == "test_gathered_layers.py" and launch not in gathering:
        return "four ranks of PyTorch in threads and in processes, and two processes of TensorFlow"
    computes = launch in (("torch", 4, "threads"), ("tensorflow", 2, ""))
    wire = test == "test_the_wire_is_measured_alike_on_all_ranks" and BACKEND != "threads"
    if file == "test_automatic.py" and not computes and not wire:
        return "four ranks of PyTorch in threads, and two processes of TensorFlow"
    if test == "test_evaluation_and_generation_equal_one_rank" and FRAMEWORK == "tensorflow" and BACKEND != "threads":
        return "four ranks of TensorFlow in threads, and four processes of PyTorch"
    return ""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what ``make test`` leaves to other launches (``full`` in tests/conftest.py)."""
    for item in items:
        if isinstance(item, pytest.Function) and (others := covered_by(item.path.name, item.originalname, item.name)):
            item.add_marker(pytest.mark.full(covered_by=others))


@pytest.fixture(scope="session")
def config() -> Config:
    """Return the configuration that the world is started with."""
    return Config(framework=FRAMEWORK)


@functools.cache
def loaded(name: str) -> Any:
    """Return the plugin ``name``, which every test in threads starts the world of every rank with."""
    return plugins.load([name])


def start_world(config: Config, name: str) -> World:
    """Return this rank's world, with the groups of every mesh of its size."""
    backend = plugins.make(loaded(name), "backend", name)
    _, size, _, _ = backend.launch_shape()
    config.train.threads = backend.prepare(config)
    nodes = [Mesh(size, 1, 1, 2)] if size == 4 else []  # sums in two levels
    groups = {ranks: None for mesh in [*meshes(size), *nodes, *context_meshes(size)] for ranks in mesh.groups()}
    manager = loaded(FRAMEWORK)
    manager.hook.hvdlm_prepare(config=config)
    return backend.start(plugins.make(manager, "framework", FRAMEWORK), list(groups), config)


class OwnWorld:
    """The world of the rank whose thread asks; elsewhere, such as in fixtures, what is the same on all ranks."""

    def __init__(self) -> None:
        self.transport, self.size = BACKEND, RANKS

    def __getattribute__(self, name: str) -> Any:
        own = rank_context.current()
        return object.__getattribute__(self, name) if own is None else getattr(WORLDS[own.rank], name)


WORLDS: dict[int, World] = {}


@pytest.fixture(scope="session")
def world(config: Config) -> Iterator[World]:
    """Yield the world of this launch."""
    if BACKEND == "threads":
        yield OwnWorld()
        return
    name = BACKEND or choose_backend(FRAMEWORK)
    assert name != "local", "start these tests under a launcher: see tests/test_launches.py"
    world = start_world(config, name)
    yield world
    world.close()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Call a test on every rank of a new world of threads."""
    if BACKEND != "threads":
        return None
    names = pyfuncitem._fixtureinfo.argnames
    arguments = {name: pyfuncitem.funcargs[name] for name in names}

    def call() -> None:
        own = rank_context.current()
        assert own is not None
        WORLDS[own.rank] = start_world(Config(framework=FRAMEWORK), BACKEND)
        pyfuncitem.obj(**arguments)

    plugins.make(loaded(BACKEND), "backend", BACKEND).run_ranks(RANKS, call)
    return True


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
    """Exit at the first failure, so that the launcher ends the other ranks, which would wait in collectives.

    The message comes last: TensorFlow's hold stacks of a graph's operations, and the end of the output is shown.
    """
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = crash.message if crash else ""
        print(
            f"{report.longreprtext[-20_000:]}\n{report.nodeid} failed:\n{message[:1000]}\n[...]\n{message[-2000:]}",
            flush=True,
        )
        time.sleep(1)  # a launcher forwards what it has read until a rank ends, but may not read what is left
        os._exit(1)
