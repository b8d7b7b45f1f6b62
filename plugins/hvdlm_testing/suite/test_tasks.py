"""Tasks: what every rank sees of the data, in numpy alone."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hvdlm_testing.plugin_under_test import Subject

from hvdlm import plugins
from hvdlm.config import Config
from hvdlm.conformance.suite import fail
from hvdlm.errors import HvdlmError
from hvdlm.inference.scorer import opener
from hvdlm.protocols.types import Batch

_SIZES = (1, 2, 3, 5)  # ranks that share the validation split
_ROWS = 4


@pytest.fixture
def config(subject: Subject) -> Config:
    """Return the options that the task is tested with."""
    config = subject.run_config()
    config.train.batch_size, config.train.eval_batch_size = _ROWS, 8
    return config


def _make(subject: Subject, config: Config) -> Any:
    try:
        given = {"config": copy.deepcopy(config), "open_scorer": opener(config)}
        return plugins.make(plugins.load([subject.name]), "task", subject.name, **given)
    except HvdlmError as error:
        hint = "" if subject.config else f" Give it its data: --hvdlm-config {subject.name}=FILE.yaml."
        pytest.fail(f"task {subject.name} is refused: {error}{hint}", pytrace=False)


def _arrays(batch: Batch) -> dict[str, np.ndarray]:
    weights = {} if batch.weights is None else {"weights": batch.weights}
    return {"inputs": batch.inputs, "targets": batch.targets, **weights, **batch.features}


def _same(one: Batch, other: Batch) -> bool:
    a, b = _arrays(one), _arrays(other)
    return a.keys() == b.keys() and all(a[n].shape == b[n].shape and np.array_equal(a[n], b[n]) for n in a)


def _joined(parts: Iterable[Batch]) -> Batch:
    parts = list(parts)
    weights = None if parts[0].weights is None else np.concatenate([p.weights for p in parts if p.weights is not None])
    features = {name: np.concatenate([p.features[name] for p in parts]) for name in parts[0].features}
    inputs, targets = (np.concatenate([getattr(p, name) for p in parts]) for name in ("inputs", "targets"))
    return Batch(inputs, targets, weights, parts[0].reset, features)


@pytest.mark.provides("hvdlm_make_task")
def test_a_batch_has_the_shapes_and_dtypes_of_the_contract(subject: Subject, config: Config) -> None:
    task, what = _make(subject, config), f"task {subject.name}"
    batch, faults = task.batch(0, 0, _ROWS), []
    if not isinstance(task.vocab, int) or task.vocab < 1:
        faults.append(f"{what}: vocab is {task.vocab!r}, expected a number of ids.")
    if not isinstance(task.fingerprint, str) or not task.fingerprint:
        faults.append(f"{what}: fingerprint is {task.fingerprint!r}, expected text that says which data it is.")
    for name, array in {"inputs": batch.inputs, "targets": batch.targets}.items():
        if array.dtype != np.int32 or array.ndim != 2 or len(array) != _ROWS:
            faults.append(
                f"{what}: {name} of {_ROWS} rows are {array.dtype} {list(array.shape)}, expected int32 [rows, time]."
            )
        elif array.min() < 0 or array.max() >= task.vocab:
            faults.append(f"{what}: {name} go from {array.min()} to {array.max()}, vocab is {task.vocab}.")
    weights = batch.weights
    if weights is not None and (weights.dtype != np.float32 or weights.shape != batch.targets.shape):
        faults.append(f"{what}: weights are {weights.dtype} {list(weights.shape)}, expected float32 like the targets.")
    missing = set(getattr(task, "reads", ())) - set(batch.features)
    if missing or any(len(array) != _ROWS for array in batch.features.values()):
        faults.append(f"{what}: batches lack {sorted(missing)}, or features have not as many rows as they.")
    fail(faults)


@pytest.mark.provides("hvdlm_make_task")
def test_rows_depend_on_seed_and_number_alone(subject: Subject, config: Config) -> None:
    task, what, faults = _make(subject, config), f"task {subject.name}", []
    whole = task.batch(1, 0, _ROWS)
    for cuts in ((0, 2, 4), (0, 1, 4)):
        parts = [task.batch(1, a, b) for a, b in pairwise(cuts)]
        if not _same(_joined(parts), whole):
            faults.append(f"{what}: rows {cuts} of batch 1, cut as ranks cut them, are not those of the whole batch.")
    if not _same(_joined([task.batch(0, 2, 4), task.batch(1, 0, 2)]), _joined([task.batch(0, 2, 4), whole.rows(0, 2)])):
        faults.append(f"{what}: batch 1 is another one after batch 0 was asked for.")
    again = _make(subject, config)
    if again.fingerprint != task.fingerprint:
        faults.append(f"{what}: it has another fingerprint every time, so that no run could be resumed.")
    if not _same(again.batch(1, 0, _ROWS), whole):
        faults.append(f"{what}: made again with the same seed, it has another batch 1.")
    if all(_same(task.batch(number, 0, _ROWS), whole) for number in (0, 2, 3)):
        faults.append(f"{what}: all its batches are the same.")
    fail(faults)


def _counted(batches: Iterable[Batch]) -> Counter[int]:
    found: Counter[int] = Counter()
    for batch in batches:
        counts = slice(None) if batch.weights is None else batch.weights > 0
        found.update(batch.targets[counts].reshape(-1).tolist())
    return found


@pytest.mark.provides("hvdlm_make_task")
def test_ranks_share_the_validation_split_and_leave_nothing_out(subject: Subject, config: Config) -> None:
    task = _make(subject, config)
    found = {size: _counted(b for rank in range(size) for b in task.validation(rank, size)) for size in _SIZES}
    faults = [
        f"task {subject.name}: {size} ranks together count {sum(counted.values())} targets of the validation split, "
        f"one rank {sum(found[1].values())}: their shares have to cover every target once."
        for size, counted in found.items()
        if counted != found[1]
    ]
    fail(faults if found[1] else [f"task {subject.name}: its validation split is empty."])
