"""Steps that go wrong are skipped by all ranks, too many of them undone, and replicas that part are noticed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from test_stops import disturb, read_rows

from hvdlm.config import TrainConfig
from hvdlm.errors import RankError
from hvdlm.protocols.types import StepResult
from hvdlm.training.consensus import Votes
from hvdlm.training.rollback import difference
from hvdlm.training.step_guard import StepGuard
from launching import STEPS, losses


def lines(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_bad_batches_are_skipped_and_after_three_in_a_row_left_out(framework: str, tmp_path: Path) -> None:
    """Batch 4 alone; then 12 to 14, after which the run goes back to step 10. Rank 1 alone has no numbers."""
    run = tmp_path / "run"
    bad = {"nan": [4, 12, 13, 14], "rows": str(tmp_path / "rows")}
    done = disturb(run, framework, 2, "--checkpoint.every", "10", **bad)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line["step"] for line in lines(run) if line.get("skipped")] == [5]
    back = next(line for line in lines(run) if "rolled_back_from" in line)
    assert back == {"step": 10, "rolled_back_from": 16, "batches_left_out": [12, 13, 14]}
    batches = [row // 8 for row, _ in read_rows(tmp_path / "rows", 2)]
    assert batches == [*range(16), 10, 11, *range(15, 33)]
    found = losses(run)
    assert len(found) == 30 and all(math.isfinite(loss) for i, loss in enumerate(found) if i != 4)
    assert "went back to the checkpoint of step 10; left out: batch 12, 13, 14" in done.stdout
    newest = json.loads((run / "checkpoints" / "step-00000030" / "manifest.json").read_text())
    assert newest["cursor"] == {"rows": 8 * 33, "batch_size": 8, "left_out": [[96, 104], [104, 112], [112, 120]]}


def test_without_a_checkpoint_the_run_ends_with_a_sentence(tmp_path: Path) -> None:
    done = disturb(tmp_path / "run", "torch", 1, nan=[2, 3, 4])
    assert done.returncode == 1
    assert "3 step(s) up to step 6 were skipped" in done.stderr and "no checkpoint to go back to" in done.stderr


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_a_flipped_bit_is_told_with_tensor_rank_and_step(framework: str, tmp_path: Path) -> None:
    options = ["--train.replica_check_every", "5", "--train.batch_size", "6"]
    done = disturb(tmp_path / "run", framework, 3, *options, flip=[2, 8])
    assert done.returncode == 1
    expected = "after step 10, rank 2 holds other values than the other 2 data rank(s) of "
    assert done.stderr.count(expected) == 1, done.stderr[-3000:]


def test_replicas_are_compared_without_an_alarm(curve: Callable[..., Path]) -> None:
    """Also where ranks train by themselves between two synchronisations."""
    local = ["--communication.exchange", "diloco", "--communication.local.steps", "5"]
    for options in ([], local):
        curve("torch", 2, *STEPS, "--train.replica_check_every", "3", *options)


def step(norm: float, skipped: bool = False) -> StepResult:
    return StepResult(1.0, 1.0, norm, skipped=skipped)


def test_a_spike_is_a_norm_far_above_the_mean_of_those_that_were_applied() -> None:
    guard = StepGuard(TrainConfig(spike=4.0), replicas_diverge=False)
    for _ in range(49):
        guard.add(step(2.0))
    assert guard.limit == math.inf
    guard.add(step(2.0))
    assert guard.limit == pytest.approx(8.0)
    guard.add(step(1000.0, skipped=True))
    guard.add(step(math.inf))
    assert guard.limit == pytest.approx(8.0)
    guard.add(step(3.0))
    assert guard.limit == pytest.approx(4 * (2.0 + 0.02))
    assert StepGuard(TrainConfig(spike=4.0), False, json.loads(json.dumps(guard.state()))).limit == guard.limit
    assert StepGuard(TrainConfig(), False, guard.state()).limit == math.inf


def test_only_skips_in_a_row_count_and_ranks_that_disagree_go_back_at_once() -> None:
    guard = StepGuard(TrainConfig(max_skips=2), replicas_diverge=False)
    assert guard.bad_rows(Votes(), 2) == []
    assert guard.bad_rows(Votes(0, skipped=2), 2) == [] and guard.bad_rows(Votes(8), 2) == []
    assert guard.bad_rows(Votes(16, skipped=2), 2) == [] and guard.bad_rows(Votes(24, skipped=2), 2) == [16, 24]
    guard.rolled_back(1, {})
    assert guard.bad_rows(Votes(32, skipped=1), 2) == [32]
    replicas_diverge = StepGuard(TrainConfig(max_skips=2), replicas_diverge=True)
    assert replicas_diverge.bad_rows(Votes(32, skipped=1), 2) == []


def test_a_run_that_goes_back_judges_spikes_as_it_did_then() -> None:
    guard = StepGuard(TrainConfig(spike=4.0), replicas_diverge=False)
    for _ in range(60):
        guard.add(step(2.0))
    then = guard.state()
    for _ in range(60):
        guard.add(step(7.0))
    guard.rolled_back(60, then)
    assert guard.state() == then and guard.limit == pytest.approx(8.0)


def test_a_run_that_keeps_going_back_gives_up() -> None:
    guard = StepGuard(TrainConfig(), replicas_diverge=False)
    for _ in range(3):
        guard.rolled_back(10, {})
    guard.rolled_back(20, {})
    with pytest.raises(RankError, match="after 3 returns to the checkpoint of step 10"):
        guard.rolled_back(10, {})


def test_a_difference_names_the_minority_or_everybody() -> None:
    a, b = {"w": 1, "v": 2}, {"w": 1, "v": 3}
    assert difference([a, a], (0, 1)) is None and difference([{}, {}], (0, 1)) is None
    assert "rank 4 holds other values than the other 2 data rank(s) of v:" in difference([a, a, b], (0, 2, 4))
    assert "ranks 0, 1 hold different values, no majority" in difference([a, b], (0, 1))
    assert "of w and 1 more tensor(s)" in difference([a, {"w": 9, "v": 9}], (0, 1))
