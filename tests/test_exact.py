"""Exact sums: losses, gradients, validation and checkpoints have the same bits on any number of data ranks."""

from __future__ import annotations

import operator
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import (
    ENCODER_MODELS,
    ENCODER_ROWS,
    ENCODER_VOCAB,
    FRAMEWORKS,
    NEWER,
    VOCAB,
    both_frameworks,
    case,
    configured_spec,
    encoder_batch,
    small_config,
    token_batch,
)
from hvdlm import plugins
from hvdlm.checkpoints.discovery import find
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.parallel.flat_layout import whole
from hvdlm.parallel.mesh import Mesh
from hvdlm.protocols.world import World
from hvdlm_backends.threads import run_ranks
from hvdlm_exact import checks
from hvdlm_language.leaf_tree import LeafTree, sum_of_leaves
from launching import SMALL, launch, losses, metrics

# The tree


def divided(most: int) -> st.SearchStrategy[tuple[int, int]]:
    """Return pairs of (leaves, ranks that share them evenly)."""
    return st.integers(1, most).flatmap(
        lambda leaves: st.tuples(
            st.just(leaves), st.sampled_from([ranks for ranks in range(1, leaves + 1) if leaves % ranks == 0])
        )
    )


def tree_of(leaves: list[Any]) -> Any:
    """Return the nested pairs in which the leaves of a batch are added: the left half is the largest power of two."""
    if len(leaves) == 1:
        return leaves[0]
    half = 1 << ((len(leaves) - 1).bit_length() - 1)
    return tree_of(leaves[:half]), tree_of(leaves[half:])


def roots_of(tree: LeafTree) -> tuple[list[Any], int]:
    """Return a rank's roots as a framework adds them, and the most sums that waited below the newest."""
    waiting: list[Any] = []
    newest: Any = None
    deepest = 0
    for number, joined in enumerate(tree.joins):
        leaf = tree.first + number
        if number and not joined:
            waiting.append(newest)
        deepest = max(deepest, len(waiting))
        newest = (newest, leaf) if joined else leaf
        for _ in range(joined - 1):
            newest = (waiting.pop(), newest)
    return [*waiting, newest], deepest


@settings(max_examples=200, deadline=None)
@given(divided(200))
def test_any_ranks_add_leaves_in_the_order_of_one_tree(shape: tuple[int, int]) -> None:
    leaves, ranks = shape
    roots = []
    for rank in range(ranks):
        tree = LeafTree(leaves, ranks, rank)
        own, deepest = roots_of(tree)
        assert len(own) <= tree.roots and deepest == tree.depth
        assert [position // tree.roots for position in tree.positions].count(rank) == len(own)
        roots += own
    assert tree.total(roots, lambda a, b: (a, b)) == tree_of(list(range(leaves)))
    if tree.count & (tree.count - 1) == 0:
        assert tree.roots == 1


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 100))
def test_metrics_are_added_in_the_order_of_the_tree(leaves: int) -> None:
    values = np.random.default_rng(leaves).normal(size=(leaves, 2)) * 1e3
    total = LeafTree(leaves, leaves, 0).total(list(values), operator.add)
    np.testing.assert_array_equal(sum_of_leaves(values, leaves, operator.add)[0], total)


# Steps


def exact_config(framework: str, rows: int, leaf: int, **options: Any) -> Config:
    config = small_config(framework, **{"layers": 1, "dropout": 0.2} | options)
    config.train.batch_size, config.train.micro_batch_size, config.train.threads = rows, leaf, 1
    config.communication.reduction = "exact"
    config.communication.bucket_bytes = 3000  # several buckets, one of which is no multiple of the ranks
    return config


def train_on(ranks: int, config: Config, steps: int = 3) -> tuple[list[tuple[float, ...]], dict[str, np.ndarray]]:
    """Train on ``ranks`` ranks that are threads; return every step's figures and rank 0's state."""
    name, encoder = config.model.name, config.model.name in ENCODER_MODELS
    spec, mesh = configured_spec(config, ENCODER_VOCAB if encoder else VOCAB), Mesh(ranks, 1, 1)
    rows, leaf = config.train.batch_size, config.train.micro_batch_size
    assert leaf is not None

    def work(world: World) -> tuple[list[tuple[float, ...]], dict[str, np.ndarray]]:
        manager = plugins.load([config.framework, "all_reduce", "exact"])
        framework = plugins.make(manager, "framework", config.framework)
        exchange = plugins.make_exchange(manager, config, world, world.group(range(ranks)))
        trainable = framework.build(spec, mesh, world, exchange, config)
        own = rows // ranks
        figures = []
        for step in range(steps):
            shape = rows, config.data.context
            batch = encoder_batch(name, step) if encoder else token_batch(step, weights=True, shape=shape)
            starts = range(world.rank * own, (world.rank + 1) * own, leaf)
            result = trainable.train_step([batch.rows(a, a + leaf) for a in starts], 0.01, step)
            figures.append((float(result.loss), float(result.tokens), float(result.grad_norm)))
        state = {name: array for name, array in trainable.state().items() if not name.startswith("carry/")}
        return figures, state

    results = run_ranks(ranks, work, config.framework, timeout=300)
    assert all(figures == results[0][0] for figures, _ in results)
    return results[0]


def assert_same_bits(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    assert first.keys() == second.keys()
    assert [name for name, array in first.items() if array.tobytes() != second[name].tobytes()] == []


# (leaves, rows of a leaf, ranks): roots that are one, several on every rank, and more than one only on some.
SHAPES = {
    "torch": [(8, 1, 2), (8, 1, 4), (8, 2, 8), (12, 1, 4), (14, 1, 2), (6, 2, 3), (5, 1, 5), (7, 1, 1), (16, 1, 2)],
    "tensorflow": [(4, 1, 2), (6, 1, 2), (6, 2, 3)],  # it traces every leaf
}


@pytest.mark.parametrize(
    ("framework", "leaves", "leaf", "ranks"),
    [(framework, *shape) for framework in FRAMEWORKS for shape in SHAPES.get(framework, [])],
)
def test_steps_have_the_bits_of_one_rank(framework: str, leaves: int, leaf: int, ranks: int) -> None:
    config = exact_config(framework, leaves * leaf, leaf)
    figures, state = train_on(ranks, config)
    expected, expected_state = train_on(1, config)
    assert figures == expected
    assert_same_bits(state, expected_state)


@pytest.mark.parametrize("model", [*ENCODER_MODELS, "llama", *NEWER, "lstm"])
def test_steps_of_other_models_have_the_bits_of_one_rank(model: str) -> None:
    config = exact_config("torch", ENCODER_ROWS, 1, **NEWER.get(model, {}))
    config.model.name = model
    figures, state = train_on(4, config)
    expected, expected_state = train_on(1, config)
    assert figures == expected
    assert_same_bits(state, expected_state)


@settings(max_examples=8, deadline=None)
@given(divided(12), st.integers(1, 3))
def test_any_rows_leaves_and_ranks_have_the_bits_of_one_rank(shape: tuple[int, int], leaf: int) -> None:
    leaves, ranks = shape
    config = exact_config("torch", leaves * leaf, leaf)
    figures, state = train_on(ranks, config, 2)
    expected, expected_state = train_on(1, config, 2)
    assert figures == expected
    assert_same_bits(state, expected_state)


@both_frameworks
def test_plain_sums_have_other_bits(framework: str) -> None:
    """The tests above can fail: with plain sums, the same rows on other ranks give other bits."""
    config = exact_config(framework, 8, 1, dropout=0.0)
    config.communication = replace(config.communication, reduction="average")
    first, second = (train_on(ranks, config, 2)[1] for ranks in (1, 2))
    assert [name for name, array in first.items() if array.tobytes() != second[name].tobytes()]


@both_frameworks
def test_exact_steps_are_plain_steps_up_to_rounding(framework: str) -> None:
    exact = exact_config(framework, 8, 2, dropout=0.0)
    plain = replace(exact, communication=replace(exact.communication, reduction="average"))
    (first, _), (second, _) = train_on(2, exact), train_on(1, plain)
    np.testing.assert_allclose(first, second, rtol=2e-5)


@pytest.mark.parametrize(
    "options", [{"precision": "bf16"}, {"lora": True}, {"threads": 2}, {"optimizer": "sgd"}], ids=str
)
def test_other_steps_have_the_bits_of_one_rank(options: dict[str, Any]) -> None:
    config = exact_config("torch", 8, 2)
    if options.pop("lora", False):
        config.lora.rank, config.lora.alpha = 2, 3.0  # no power of two: the factor rounds
    for name, value in options.items():
        setattr(config.train, name, value)
    figures, state = train_on(4, config)
    expected, expected_state = train_on(1, config)
    assert figures == expected
    assert_same_bits(state, expected_state)


def test_tensorflow_keeps_the_order_of_nested_sums() -> None:
    tf = pytest.importorskip("tensorflow")
    from hvdlm_tensorflow.gradients import _ordered_sum

    values = np.random.default_rng(1).normal(size=(4, 4096)).astype(np.float32)

    @tf.function
    def total(x: Any) -> Any:
        terms = [x[i * 4096 : (i + 1) * 4096] for i in range(4)]
        return _ordered_sum(_ordered_sum(terms[0], terms[1]), _ordered_sum(terms[2], terms[3]))

    expected = (values[0] + values[1]) + (values[2] + values[3])
    np.testing.assert_array_equal(total(tf.constant(values.reshape(-1))).numpy(), expected)


# Runs

RUN = [*SMALL, "--model.layers", "1", "--model.dropout", "0.1", "--train.steps", "8", "--train.warmup", "2"]
RUN += ["--train.eval_every", "4", "--checkpoint.every", "4", "--communication.reduction", "exact"]
LEAF = ["--communication.exact_rows", "1"]


def run(folder: Path, framework: str, ranks: int, *options: str, launcher: str = "threads") -> Path:
    arguments = ["-m", "hvdlm", "--framework", framework, "--log.run", str(folder), *RUN, *options]
    done = launch(launcher, ranks, arguments)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return folder


def arrays_of(folder: Path) -> dict[str, np.ndarray]:
    """Return all arrays of a run's last checkpoint."""
    checkpoint = find(folder, "auto")
    assert checkpoint is not None
    reader = checkpoint.reader()
    return {name: reader.read(name, whole(stored[0].shard.shape)) for name, stored in checkpoint.tensors.items()}


def figures_of(folder: Path) -> list[tuple[str, float]]:
    """Return the losses, norms and validation losses of a run."""
    names = ("loss", "grad_norm", "val_loss", "perplexity")
    return [(name, line[name]) for line in metrics(folder) for name in names if name in line]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from a framework and options to the folder of a run on one rank."""
    runs: dict[tuple[str, ...], Path] = {}

    def train(framework: str, *options: str) -> Path:
        key = (framework, *options)
        if key not in runs:
            runs[key] = run(tmp_path_factory.mktemp("one") / "run", framework, 1, *options)
        return runs[key]

    return train


@pytest.mark.parametrize(
    ("framework", "ranks", "options", "launcher"),
    [
        ("torch", 8, [], "threads"),
        ("torch", 2, ["--train.micro_batch_size", "2"], "mpirun"),
        ("torch", 4, ["--backend", "mpi4py"], "mpirun"),
        ("torch", 2, ["--train.micro_batch_size", "4"], "horovodrun --gloo"),
        ("tensorflow", 2, ["--train.micro_batch_size", "2"], "mpirun"),
        case(
            "tensorflow",
            2,
            [],
            "threads",
            covered_by="mpirun; test_steps_have_the_bits_of_one_rank, whose ranks are threads",
        ),
    ],
)
def test_a_run_has_the_bits_of_one_rank(
    one_rank: Any, tmp_path: Path, framework: str, ranks: int, options: list[str], launcher: str
) -> None:
    folder, expected = (
        run(tmp_path / "run", framework, ranks, *LEAF, *options, launcher=launcher),
        one_rank(framework, *LEAF),
    )
    assert figures_of(folder) == figures_of(expected) and len(losses(folder)) == 8
    assert_same_bits(arrays_of(folder), arrays_of(expected))


# TensorFlow unrolls recurrent models, for every leaf.
STATEFUL = [*LEAF, "--model.name", "lstm", "--data.sampling", "sequential", "--data.context", "4"]
STATEFUL += ["--checkpoint.keep", "9"]


@both_frameworks
def test_one_ranks_checkpoint_resumes_on_more_with_the_same_bits(one_rank: Any, tmp_path: Path, framework: str) -> None:
    ranks = 4 if framework == "torch" else 2  # every rank of TensorFlow traces every leaf
    expected = one_rank(framework, *STATEFUL)
    shutil.copytree(expected, tmp_path / "more")
    shutil.rmtree(tmp_path / "more" / "checkpoints" / "step-00000008")
    run(tmp_path / "more", framework, ranks, *STATEFUL, "--checkpoint.resume", "auto")
    assert losses(tmp_path / "more") == losses(expected)
    assert_same_bits(arrays_of(tmp_path / "more"), arrays_of(expected))


# What is refused


def refusals() -> Iterator[tuple[dict[str, Any], str]]:
    """Yield options and what the error says."""
    leaf = {"train.micro_batch_size": 2}
    yield {}, "set --communication.exact_rows, for example to 8"
    yield {**leaf, "communication.exchange": "diloco"}, "communication.exchange diloco: it doesn't sum whole gradients"
    yield {**leaf, "communication.compression.algorithm": "int8"}, "compression.algorithm int8: it doesn't sum whole"
    yield {**leaf, "parallel.zero": 1}, "parallel.zero 1: each rank has the norm of its own shard"
    yield {**leaf, "parallel.tensor": 2}, "such ranks share the sums of a single sequence"
    yield {**leaf, "parallel.pipeline": 2}, "set both to 1"
    yield {**leaf, "communication.predivide": 2.0}, "communication.predivide 2: gradients are divided once"
    yield {**leaf, "train.compile": True}, "train.compile true: compilers choose the order"
    yield {**leaf, "framework": "jax"}, "framework jax: its plugin adds up micro-batches in an order of its own"
    yield (
        {**leaf, "communication.exact_rows": 4},
        "train.micro_batch_size 2 is no multiple of communication.exact_rows 4",
    )


@pytest.mark.parametrize(("options", "message"), list(refusals()), ids=lambda value: str(value)[:40])
def test_what_exact_sums_do_not_support_is_refused(options: dict[str, Any], message: str) -> None:
    config = Config.load({"communication.reduction": "exact"}, {k: v for k, v in options.items() if k != "framework"})
    config.framework = options.get("framework", "torch")
    with pytest.raises(HvdlmError) as error:
        checks.check(config)
    assert message in str(error.value) and str(error.value).count(". ") == 0


def test_rows_that_no_rank_has_are_refused() -> None:
    options = ["--communication.reduction", "exact", "--communication.exact_rows", "3"]
    done = launch("threads", 2, ["-m", "hvdlm", *SMALL, *options])
    assert done.returncode == 2
    assert "communication.exact_rows 3 doesn't divide the 4 sequences of a rank: choose one of 1, 2, 4" in done.stderr


@both_frameworks
def test_an_exact_run_computes_with_one_thread_by_default(framework: str) -> None:
    from hvdlm_backends.environment import set_threads

    config = exact_config(framework, 8, 2)
    config.train.threads = None
    assert set_threads(None, config) == 1
    config.train.threads = 3
    assert set_threads(None, config) == 3
