"""Batches that a thread makes ahead are those that a run without it reads, in its order and no others."""

from __future__ import annotations

import itertools
import json
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdlm.config import Config
from hvdlm.diagnostics.phases import process
from hvdlm.errors import RankError
from hvdlm.protocols.types import Batch
from hvdlm.training import batches as module
from hvdlm.training.batches import THREAD, Batches
from hvdlm.training.data_cursor import DataCursor
from launching import wait_until

STEPS = 10**6


@pytest.fixture(autouse=True, scope="module")
def always() -> Iterator[None]:
    """Have the thread make batches from the third step on, however fast they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SHARE", -1.0)
        yield


class Rows:
    """A task whose inputs are the numbers of the rows."""

    def __init__(self, read: Callable[[int], None] = lambda first: None) -> None:
        self.read = read
        self.calls: list[int] = []
        self.made: list[weakref.ref[np.ndarray]] = []

    def rows(self, first: int, last: int) -> Batch:
        self.calls.append(first)
        self.read(first)
        numbers = np.arange(first, last)[:, None]
        self.made.append(weakref.ref(numbers))
        return Batch(numbers, numbers + 1)


def data_run(task: Any, cursor: DataCursor, batch: int, prefetch: int, rank: int = 0, ranks: int = 1) -> Any:
    """Return what ``Batches`` uses of a run: ``batch`` rows in a step, of which this rank has its share."""
    config = Config()
    config.data.prefetch, config.train.micro_batch_size = prefetch, 1
    share = batch // ranks
    return SimpleNamespace(config=config, task=task, cursor=cursor, rows=(rank * share, rank * share + share))


def step(run: Any, batches: Batches, left: int = STEPS) -> tuple[int, list[int]]:
    """Return the first row of the next step's batch, and the rows that the rank gets of it."""
    row = run.cursor.advance()
    return row, [int(b.inputs[0, 0]) for b in batches.take(row, left)]


Action = tuple[str, int]
ACTIONS = st.one_of(
    st.tuples(st.just("steps"), st.integers(1, 6)),
    st.tuples(st.just("save"), st.just(0)),
    st.tuples(st.just("roll back"), st.integers(0, 3)),  # and leave out that many of the last batches
    st.tuples(st.just("restart on ranks"), st.sampled_from([1, 2, 4])),  # from the last save: killed, and resumed
)


def samples(actions: list[Action], batch: int, prefetch: int) -> Iterator[tuple[int, list[int]]]:
    """Yield (first row, rows of all ranks in order) of every step of a run with these ups and downs."""
    task, ranks, saved, recent = Rows(), 1, DataCursor(batch).to_json(), []
    cursors = [DataCursor.of({"cursor": saved}, batch)]
    while True:
        restarted = False
        runs = [data_run(task, cursors[rank], batch, prefetch, rank, ranks) for rank in range(ranks)]
        batches = [Batches(run).__enter__() for run in runs]
        while actions and not restarted:
            kind, number = actions.pop(0)
            if kind == "steps":
                for _ in range(number):
                    rows, shards = zip(*map(step, runs, batches), strict=True)
                    recent.append(rows[0])
                    assert len(set(rows)) == 1
                    yield rows[0], list(itertools.chain(*shards))
            elif kind == "save":
                saved = json.loads(json.dumps(runs[0].cursor.to_json()))
            elif kind == "roll back":
                for run in runs:
                    left_out = run.cursor.left_out
                    run.cursor = DataCursor.of({"cursor": saved}, batch)
                    run.cursor.left_out = sorted({*run.cursor.left_out, *left_out})
                    run.cursor.leave_out(recent[len(recent) - number :])
            else:
                ranks, restarted = number, True
                cursors = [DataCursor.of({"cursor": saved}, batch) for _ in range(ranks)]
        for each in batches:
            each.__exit__(None, None, None)
        if not restarted:
            return


@settings(max_examples=60, deadline=None)
@given(st.lists(ACTIONS, max_size=12), st.integers(1, 2), st.integers(1, 4))
def test_prefetching_does_not_change_the_samples(actions: list[Action], per_rank: int, prefetch: int) -> None:
    """Over steps, saves, rollbacks that leave out batches, kills, and restarts on other numbers of ranks."""
    batch = 4 * per_rank
    expected = list(samples(list(actions), batch, 0))
    assert list(samples(list(actions), batch, prefetch)) == expected
    assert all(rows == list(range(row, row + batch)) for row, rows in expected)


def test_later_batches_are_made_while_a_step_is_computed() -> None:
    task = Rows()
    run = data_run(task, DataCursor(4), 4, 2)
    with Batches(run) as batches:
        for number in range(5):
            assert step(run, batches)[0] == 4 * number
            made = number + 3 if number > 1 else number + 1  # two steps come before the thread
            wait_until(lambda: len(task.calls) == made, 10)  # noqa: B023
    assert task.calls == [4 * number for number in range(7)]


def test_no_batch_is_made_that_no_step_will_take() -> None:
    task = Rows()
    run = data_run(task, DataCursor(4), 4, 3)
    with Batches(run) as batches:
        for left in (4, 3, 2, 1, 0):
            step(run, batches, left)
    assert task.calls == [0, 4, 8, 12, 16]


def test_memory_holds_no_more_batches_than_asked_for() -> None:
    task = Rows()
    run = data_run(task, DataCursor(4), 4, 2)
    with Batches(run) as batches:
        for number in range(6):
            step(run, batches)
            made = number + 3 if number > 1 else number + 1
            wait_until(lambda: len(task.made) == made, 10)  # noqa: B023
            time.sleep(0.01)
            assert sum(made() is not None for made in task.made) <= 3
            assert sum(future.done() for _, future in batches._queue) <= 2


def test_an_error_is_raised_by_the_step_that_needs_the_batch() -> None:
    def read(first: int) -> None:
        if first == 16:
            raise RankError("tokens.bin has been truncated")

    run = data_run(Rows(read), DataCursor(4), 4, 3)
    with pytest.raises(RankError, match=r"^tokens\.bin has been truncated$"), Batches(run) as batches:
        for number in range(6):
            assert step(run, batches) == (4 * number, list(range(4 * number, 4 * number + 4)))
            wait_until(lambda: all(made.done() for _, made in batches._queue), 10)
    assert run.cursor.rows == 20  # four steps are done, the fifth had the error


@pytest.mark.parametrize("fails", [False, True])
def test_the_thread_ends_with_the_run(fails: bool) -> None:
    def alive() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name == THREAD]

    run = data_run(Rows(), DataCursor(4), 4, 2)
    try:
        with Batches(run) as batches:
            for _ in range(3):
                step(run, batches)
            assert alive() == [THREAD]
            if fails:
                raise RankError("another rank failed")
    except RankError:
        wait_until(lambda: not alive(), 10)
    assert alive() == []


def test_a_task_may_refuse_another_thread() -> None:
    threads = set()
    task: Any = Rows(lambda first: threads.add(threading.current_thread()))
    task.rows_in_thread = False
    run = data_run(task, DataCursor(4), 4, 2)
    with Batches(run) as batches:
        assert [step(run, batches)[0] for _ in range(4)] == [0, 4, 8, 12]
    assert threads == {threading.current_thread()} and task.calls == [0, 4, 8, 12]


def test_waiting_for_a_batch_is_a_phase_of_its_own() -> None:
    phases: list[str] = []

    def read(first: int) -> None:
        if threading.current_thread().name == THREAD:
            wait_until(lambda: process.phase.name != before.name, 10)
        phases.append(process.phase.name)

    before = process.phase
    run = data_run(Rows(read), DataCursor(4), 4, 1)
    with Batches(run) as batches:
        for _ in range(3):
            step(run, batches, 0)
    assert phases == [before.name, before.name, "waiting for its next batch"] and process.phase is before


@pytest.mark.parametrize("seconds, threaded", [(0.0, False), (0.02, True)])
def test_only_slow_batches_are_worth_a_thread(seconds: float, threaded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARE", 0.2)
    run = data_run(Rows(lambda first: time.sleep(seconds)), DataCursor(4), 4, 2)
    with Batches(run) as batches:
        for _ in range(5):
            step(run, batches)
            time.sleep(0.03)  # the step
        assert (batches._thread.ident is not None) == threaded
