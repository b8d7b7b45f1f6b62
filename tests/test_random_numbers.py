"""Random numbers of ranks that are threads of one process: those of ranks that are processes, bit for bit."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders import (
    CONTEXT,
    ENCODER_MODELS,
    ENCODER_ROWS,
    ENCODER_VOCAB,
    FRAMEWORKS,
    VOCAB,
    both_frameworks,
    configured_spec,
    encoder_batch,
    parameters,
    small_config,
    token_batch,
)
from hvdlm import plugins
from hvdlm.communication.all_reduce import AllReduceExchange
from hvdlm.config import Config, TrainConfig
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.mesh import Mesh
from hvdlm.protocols.types import Batch
from hvdlm_backends.local import AloneGroup, LocalWorld
from launching import ONE_LAYER, SMALL, launch, losses, run_python

RANKS, STEPS = {"torch": 4, "tensorflow": 2}, 3  # TensorFlow traces a step on every rank


def custom_module(framework: str) -> ModelSpec:
    """Return the description of a plugin's module with a dropout layer of the framework's own."""
    if framework == "torch":
        from torch import nn

        from hvdlm_torch.models.custom_module import describe

        return describe(
            lambda: nn.Sequential(nn.Embedding(VOCAB, 16), nn.Dropout(0.3), nn.Linear(16, VOCAB)), VOCAB, CONTEXT
        )
    from keras import Sequential, layers

    from hvdlm_tensorflow.models.custom_module import describe

    return describe(
        lambda: Sequential([layers.Embedding(VOCAB, 16), layers.Dropout(0.3), layers.Dense(VOCAB)]), VOCAB, CONTEXT
    )


class Case:
    """A model with dropout, and its batches."""

    def __init__(self, framework: str, model: str, **train: Any) -> None:
        encoder = model in ENCODER_MODELS
        self.ranks = RANKS[framework]
        self.config: Config = small_config(
            framework,
            "gpt" if model == "own" else model,
            layers=1,
            dropout=0.3,
            **({"initial_scale": None} if encoder else {}),
        )
        self.config.train = TrainConfig(
            **{"batch_size": (ENCODER_ROWS if encoder else 8) * self.ranks, "warmup": 0, "threads": 1} | train
        )
        self.config.data.context = 64 if encoder else CONTEXT
        self._model = model
        self._encoder = encoder

    def build(self, rank: int) -> Any:
        """Return the trainable of a rank that sees no gradients of the others."""
        framework = plugins.make(plugins.load([self.config.framework]), "framework", self.config.framework)
        world: Any = LocalWorld()
        world.rank, world.group = rank, lambda ranks: AloneGroup(ranks[0])
        exchange = AllReduceExchange(AloneGroup())
        return framework.build(self._spec(), Mesh(self.ranks, 1, 1), world, exchange, self.config)

    def train(self, rank: int) -> list[float]:
        """Return the losses of such a rank."""
        trainable = self.build(rank)
        return [trainable.train_step(self.batches(step), 0.01, step).loss for step in range(STEPS)]

    def _spec(self) -> ModelSpec:
        if self._model == "own":
            return custom_module(self.config.framework)
        return configured_spec(self.config, ENCODER_VOCAB if self._encoder else VOCAB)

    def batches(self, step: int) -> list[Batch]:
        """Return the micro-batches of a step."""
        if self._encoder:
            return [encoder_batch(self._model, step)]
        rows = self.config.train.micro_batch_size or 8
        return [token_batch(step).rows(start, start + rows) for start in range(0, 8, rows)]


def at_the_same_time(ranks: int, action: Callable[[int], Any]) -> list[Any]:
    """Return what ``action(rank)`` returned on every rank, each a thread of this process."""
    start = threading.Barrier(ranks, timeout=60)

    def run(rank: int) -> Any:
        start.wait(60)
        return action(rank)

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(run, range(ranks)))


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt": ("gpt", {"micro_batch_size": 4}),
    "gpt-recomputed": ("gpt", {"activation_checkpointing": True}),
    "gpt-bf16": ("gpt", {"precision": "bf16"}),
    "lstm-recomputed": ("lstm", {"activation_checkpointing": True}),
    **{model: (model, {}) for model in ENCODER_MODELS},
    "own": ("own", {"micro_batch_size": 4}),
}


# TensorFlow takes the seed of every mask as an argument: one case shows that it is the rank's, one Keras' layers.
RUNS = [("torch", case) for case in CASES] + [("tensorflow", case) for case in ("gpt-recomputed", "own")]


@pytest.mark.parametrize(("framework", "case"), [run for run in RUNS if run[0] in FRAMEWORKS])
def test_ranks_in_threads_draw_what_processes_draw(framework: str, case: str) -> None:
    (model, options), ranks = CASES[case], RANKS[framework]
    expected = [Case(framework, model, **options).train(rank) for rank in range(ranks)]
    drawn = at_the_same_time(ranks, Case(framework, model, **options).train)
    assert drawn == expected
    assert len({losses[0] for losses in drawn}) == ranks  # every data rank has masks of its own


@both_frameworks
def test_threads_make_a_custom_module_of_the_same_values(framework: str) -> None:
    config = small_config(framework)

    def values(rank: int) -> dict[str, np.ndarray]:
        built = plugins.make(plugins.load([framework]), "framework", framework)
        return parameters(
            built.build(custom_module(framework), Mesh(1, 1, 1), LocalWorld(), AllReduceExchange(AloneGroup()), config)
        )

    expected, *others = values(0), *at_the_same_time(4, values)
    for other in others:
        assert other.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(other[name], value, err_msg=name)


@both_frameworks
@pytest.mark.parametrize("model", ["gpt", "own"])
def test_a_step_leaves_the_random_numbers_of_the_program(framework: str, model: str) -> None:
    case = Case(framework, model)
    trainable = case.build(0)  # a plugin's module may draw its initial values
    seeded = program_numbers(framework, lambda: None)
    assert program_numbers(framework, lambda: trainable.train_step(case.batches(0), 0.01, 0)) == seeded


def program_numbers(framework: str, action: Callable[[], Any]) -> list[float]:
    """Return what a program that has seeded its random numbers draws after ``action``."""
    random.seed(5)
    np.random.seed(5)
    if framework == "torch":
        import torch

        torch.manual_seed(5)
    action()
    drawn = [random.random(), float(np.random.random())]
    return [*drawn, torch.rand(1).item()] if framework == "torch" else drawn


@both_frameworks
def test_threads_and_mpi_have_the_same_losses_with_dropout(framework: str, tmp_path: Path) -> None:
    """Two tensor ranks draw the same masks; with PyTorch, two data ranks of two tensor ranks draw different ones."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 100)
    options = ["--framework", framework, "--data.path", str(tmp_path / "text.txt"), "--parallel.tensor", "2", *SMALL]
    options += ["--model.dropout", "0.2", "--train.activation_checkpointing", "true", "--train.steps", "4"]
    options += ["--train.warmup", "0", "--train.eval_every", "0", "--log.tensorboard", "false"]
    options += ONE_LAYER if framework == "tensorflow" else ()
    runs = {name: ["-m", "hvdlm", *options, "--log.run", str(tmp_path / name)] for name in ("threads", "mpi4py")}
    done = run_python([*runs["threads"], "--backend", "threads", "--ranks", str(RANKS[framework])])
    assert done.returncode == 0, done.stderr[-3000:]
    done = launch("mpirun", RANKS[framework], [*runs["mpi4py"], "--backend", "mpi4py"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "threads") == losses(tmp_path / "mpi4py") and len(losses(tmp_path / "threads")) == 4
