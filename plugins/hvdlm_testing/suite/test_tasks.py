"""Tests of tasks: every rank's batches, in numpy alone."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest

from hvdlm import plugins
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.protocols.task import Task
from hvdlm.protocols.types import Batch
from hvdlm_testing.checks.harness import lacking
from hvdlm_testing.plugin_under_test import PluginUnderTest
from hvdlm_testing.suite import fail

_TOKENIZER = ("vocab", "hash", "encode", "encode_prompt", "decode", "to_json")
_SIZES = (1, 2, 3, 5)  # ranks that share the validation split
_ROWS = 4
_BESIDE = 8  # batches that are made in a thread and validated at once


@pytest.fixture
def config(plugin: PluginUnderTest) -> Config:
    """Return the configuration that the task is tested with."""
    config = plugin.run_config()
    config.train.batch_size, config.train.eval_batch_size = _ROWS, 8
    return config


def _make(plugin: PluginUnderTest, config: Config) -> Any:
    try:
        task = plugins.make(plugins.load([plugin.name]), "task", plugin.name, config=copy.deepcopy(config))
    except HvdlmError as error:
        hint = "" if plugin.config else f" Name its data: --hvdlm-config {plugin.name}=FILE.yaml."
        pytest.fail(f"task {plugin.name} is refused: {error}{hint}", pytrace=False)
    if missing := lacking(task, Task):
        fail([f"task {plugin.name} lacks {missing} of hvdlm.protocols.task.Task."])
    return task


def _arrays(batch: Batch) -> dict[str, np.ndarray]:
    weights = {} if batch.weights is None else {"weights": batch.weights}
    return {"inputs": batch.inputs, "targets": batch.targets, **weights, **batch.features}


def _shapes(shapes: list[dict[str, tuple[int, ...]]]) -> str:
    """Return the shapes of the first array that differs between rows."""
    name = next(n for n in shapes[0] if any(shape.get(n) != shapes[0][n] for shape in shapes))
    return ", ".join(str(list(shape.get(name, ()))) for shape in shapes) + f" ({name})"


def _same(first: Batch, second: Batch) -> bool:
    a, b = _arrays(first), _arrays(second)
    return a.keys() == b.keys() and all(a[n].shape == b[n].shape and np.array_equal(a[n], b[n]) for n in a)


def _joined(batches: list[Batch]) -> Batch:
    """Return the rows of several batches as one batch."""
    first = batches[0]
    weights = None
    if first.weights is not None:
        weights = np.concatenate([batch.weights for batch in batches if batch.weights is not None])
    features = {name: np.concatenate([batch.features[name] for batch in batches]) for name in first.features}
    inputs, targets = (np.concatenate([getattr(batch, name) for batch in batches]) for name in ("inputs", "targets"))
    return Batch(inputs, targets, weights, first.reset, features)


@pytest.mark.provides("hvdlm_make_task")
def test_a_batch_has_the_shapes_and_dtypes_of_the_contract(plugin: PluginUnderTest, config: Config) -> None:
    task, label = _make(plugin, config), f"task {plugin.name}"
    batch, faults = task.rows(0, _ROWS), []
    if not isinstance(task.vocab, int) or task.vocab < 1:
        faults.append(f"{label}: vocab is {task.vocab!r}, expected the number of token ids.")
    if not isinstance(task.fingerprint, str) or not task.fingerprint:
        faults.append(f"{label}: fingerprint is {task.fingerprint!r}, expected a string that identifies the data.")
    for name, array in {"inputs": batch.inputs, "targets": batch.targets}.items():
        if array.dtype != np.int32 or array.ndim != 2 or len(array) != _ROWS:
            faults.append(
                f"{label}: {name} of {_ROWS} rows are {array.dtype} {list(array.shape)}, expected int32 [rows, time]."
            )
        elif array.min() < 0 or array.max() >= task.vocab:
            faults.append(f"{label}: {name} range from {array.min()} to {array.max()}, vocab is {task.vocab}.")
    weights = batch.weights
    if weights is not None and (weights.dtype != np.float32 or weights.shape != batch.targets.shape):
        faults.append(
            f"{label}: weights are {weights.dtype} {list(weights.shape)}, expected float32 {list(batch.targets.shape)}."
        )
    missing = set(getattr(task, "reads", ())) - set(batch.features)
    if missing or any(len(array) != _ROWS for array in batch.features.values()):
        faults.append(f"{label}: batches lack {sorted(missing)}, or features have another number of rows.")
    if not task.reads and batch.targets.shape != batch.inputs.shape:
        faults.append(f"{label}: targets are {list(batch.targets.shape)}, inputs {list(batch.inputs.shape)}.")
    if not task.reads and batch.inputs.shape[-1] > config.data.context:
        faults.append(f"{label}: rows are {batch.inputs.shape[-1]} tokens wide, data.context is {config.data.context}.")
    if not batch.tokens:
        faults.append(
            f"{label}: no target of rows(0, {_ROWS}) counts, their weights are 0: there is nothing to learn, and the "
            "mean loss is 0 / 0."
        )
    fail(faults)


@pytest.mark.provides("hvdlm_make_task")
def test_rows_depend_only_on_the_seed_and_their_numbers(plugin: PluginUnderTest, config: Config) -> None:
    task, label, faults = _make(plugin, config), f"task {plugin.name}", []
    shapes = [{name: a.shape[1:] for name, a in _arrays(task.rows(n, n + 1)).items()} for n in range(_ROWS)]
    if any(shape != shapes[0] for shape in shapes):
        fail([f"{label}: rows 0 to {_ROWS - 1} have the shapes {_shapes(shapes)}: ranks need rows of one shape."])
    whole = task.rows(_ROWS, 2 * _ROWS)
    kept = copy.deepcopy(whole)
    for bounds in ((0, 2, 4), (0, 1, 4)):
        of_ranks = [task.rows(_ROWS + first, _ROWS + last) for first, last in pairwise(bounds)]
        if not _same(_joined(of_ranks), whole):
            faults.append(f"{label}: rows of batch 1, divided at {bounds} between ranks, differ from the whole batch.")
    before = task.rows(2, 4)
    if not _same(_joined([before, task.rows(4, 6)]), _joined([before, whole.rows(0, 2)])):
        faults.append(f"{label}: batch 1 differs after batch 0 was asked for.")
    if not _same(whole, kept):
        faults.append(
            f"{label}: later calls of rows change the arrays of batch 1, which is still in use: return others."
        )
    second = _make(plugin, config)
    if second.fingerprint != task.fingerprint:
        faults.append(f"{label}: its fingerprint differs every time, so that no run could be resumed.")
    if not _same(second.rows(_ROWS, 2 * _ROWS), whole):
        faults.append(f"{label}: made a second time with the same seed, its batch 1 differs.")
    if all(_same(task.rows(number * _ROWS, (number + 1) * _ROWS), whole) for number in (0, 2, 3)):
        faults.append(f"{label}: all its batches are the same.")
    fail(faults)


def _counts(batches: Iterable[Batch]) -> Counter[int]:
    """Return how often each token is a target that counts."""
    counts: Counter[int] = Counter()
    for batch in batches:
        weighted = slice(None) if batch.weights is None else batch.weights > 0
        counts.update(batch.targets[weighted].reshape(-1).tolist())
    return counts


@pytest.mark.provides("hvdlm_make_task")
def test_ranks_divide_the_validation_split_completely(plugin: PluginUnderTest, config: Config) -> None:
    task = _make(plugin, config)
    by_size = {size: _counts(b for rank in range(size) for b in task.validation(rank, size)) for size in _SIZES}
    faults = [
        f"task {plugin.name}: {size} ranks together count {sum(counts.values())} targets of the validation split, "
        f"one rank {sum(by_size[1].values())}: together they have to cover every target once."
        for size, counts in by_size.items()
        if counts != by_size[1]
    ]
    fail(faults if by_size[1] else [f"task {plugin.name}: its validation split has no target that counts."])


@pytest.mark.provides("hvdlm_make_task")
def test_rows_are_as_many_as_asked_for_without_end(plugin: PluginUnderTest, config: Config) -> None:
    task, faults = _make(plugin, config), []
    for first in (0, 1, 97, 1_000, 10**5 + 1):
        batch = task.rows(first, first + _ROWS)
        if len(batch.inputs) != _ROWS or len(batch.targets) != _ROWS:
            faults.append(
                f"task {plugin.name}: rows({first}, {first + _ROWS}) has {len(batch.inputs)} rows, expected {_ROWS}: "
                "the order of rows is endless, and begins again where the data end."
            )
    fail(faults[:1])


@pytest.mark.provides("hvdlm_make_task")
def test_a_tokenizer_restores_what_it_encodes(plugin: PluginUnderTest, config: Config) -> None:
    task, label, faults = _make(plugin, config), f"task {plugin.name}", []
    tokenizer: Any = getattr(task, "tokenizer", None)
    lacking = [name for name in _TOKENIZER if not hasattr(tokenizer, name)]
    if lacking:
        fail([f"{label}: its tokenizer lacks {', '.join(lacking)}, without which a run can't save or resume."])
    if not isinstance(tokenizer.hash, str) or _make(plugin, config).tokenizer.hash != tokenizer.hash:
        faults.append(f"{label}: its tokenizer's hash is {tokenizer.hash!r}, expected one string for the same data.")
    if _json(tokenizer) is None:
        faults.append(f"{label}: to_json() of its tokenizer returns no JSON values, which tokenizer.json holds.")
    ids = [int(i) for i in task.rows(0, _ROWS).targets[0] if i < tokenizer.vocab]
    text = tokenizer.decode(ids)
    encoded = tokenizer.encode(text, special=True)  # decode() spells special tokens, such as the end of a document
    if encoded.dtype != np.int32 or encoded.ndim != 1:
        faults.append(
            f"{label}: encode() of its tokenizer returns {encoded.dtype} {list(encoded.shape)}, not int32 [n]."
        )
    restored = tokenizer.decode([int(i) for i in encoded])
    if restored.strip() != text.strip():
        faults.append(f"{label}: its tokenizer decodes {text[:40]!r}, encoded, to {restored[:40]!r}.")
    fail(faults)


def _json(tokenizer: Any) -> str | None:
    try:
        return json.dumps(tokenizer.to_json())
    except (TypeError, ValueError):
        return None


@pytest.mark.provides("hvdlm_make_task")
def test_rows_are_the_same_in_a_thread_beside_validation(plugin: PluginUnderTest, config: Config) -> None:
    task, threaded = _make(plugin, config), _make(plugin, config)
    expected = [task.rows(row, row + _ROWS) for row in range(0, _BESIDE * _ROWS, _ROWS)]
    validation = list(islice(task.validation(0, 1), _BESIDE))
    if not getattr(task, "rows_in_thread", True):
        return
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(lambda: [threaded.rows(row, row + _ROWS) for row in range(0, _BESIDE * _ROWS, _ROWS)])
        beside = list(islice(threaded.validation(0, 1), _BESIDE))
    if not all(map(_same, [*expected, *validation], [*made.result(), *beside])):
        fail(
            [
                f"task {plugin.name}: rows in a thread beside validation returns other batches: separate them, "
                "or set rows_in_thread = False."
            ]
        )


@pytest.mark.provides("hvdlm_make_task")
def test_a_task_is_made_for_its_own_name_only(plugin: PluginUnderTest, config: Config) -> None:
    if plugins.load([plugin.name]).hook.hvdlm_make_task(name="another", config=config):
        fail([f"{plugin.name}: hvdlm_make_task returns a task for every name: return None unless it is its own."])
