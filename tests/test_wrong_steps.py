"""Bad steps are skipped by all ranks, consecutive ones rolled back, and diverged replicas detected."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from hvdlm.checkpoints.state_checks import difference
from hvdlm.config import TrainConfig
from hvdlm.protocols.types import StepResult
from hvdlm.training.consensus import Votes
from hvdlm.training.step_guard import StepGuard
from launching import ONE_LAYER, losses, metrics, read_rows, run_with_faults


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_three_bad_batches_in_a_row_are_rolled_back(framework: str, tmp_path: Path) -> None:
    """Rank 1 has non-finite losses in batch 4, which is skipped, and in 12 to 14, which cause a rollback to step 10."""
    run = tmp_path / "run"
    bad = {"nan": [4, 12, 13, 14], "rows": str(tmp_path / "rows")}
    done = run_with_faults(run, framework, 2, *ONE_LAYER, "--checkpoint.every", "10", **bad)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line["step"] for line in metrics(run) if line.get("skipped")] == [5]
    back = next(line for line in metrics(run) if "rolled_back_from" in line)
    assert back == {"step": 10, "rolled_back_from": 16, "batches_left_out": [12, 13, 14]}
    batches = [row // 8 for row, _ in read_rows(tmp_path / "rows", 2)]
    assert batches == [*range(16), 10, 11, *range(15, 33)]
    curve = losses(run)
    assert len(curve) == 30 and all(math.isfinite(loss) for i, loss in enumerate(curve) if i != 4)
    assert "rolled back to the checkpoint of step 10; left out: batch 12, 13, 14" in done.stdout
    newest = json.loads((run / "checkpoints" / "step-00000030" / "manifest.json").read_text())
    assert newest["cursor"] == {"rows": 8 * 33, "batch_size": 8, "left_out": [[96, 104], [104, 112], [112, 120]]}


def test_without_a_checkpoint_bad_steps_end_the_run(tmp_path: Path) -> None:
    done = run_with_faults(tmp_path / "run", "torch", 1, nan=[2, 3, 4])
    assert done.returncode == 1
    assert "3 step(s) up to step 6 were skipped" in done.stderr and "no checkpoint to go back to" in done.stderr


@pytest.mark.parametrize(
    "framework, ranks, what, options, expected",
    [
        (
            "torch",
            3,
            "parameters",
            ["--train.batch_size", "6"],
            "rank 2 holds other values than the other 2 replica(s) of ",
        ),
        (
            "tensorflow",
            2,
            "norm",
            ["--parallel.tensor", "2"],
            "ranks 0, 1 hold different values, no majority shows which",
        ),
    ],
    ids=["torch-data", "tensorflow-tensor"],
)
def test_a_flipped_bit_is_reported_with_tensor_rank_and_step(
    framework: str, ranks: int, what: str, options: list[str], expected: str, tmp_path: Path
) -> None:
    options = [*ONE_LAYER, "--train.replica_check_every", "5", *options]
    damage = [[ranks - 1, 8, what, "flip"]]
    done = run_with_faults(tmp_path / "run", framework, ranks, *options, damage=damage)
    assert done.returncode == 1
    assert done.stderr.count(f"after step 10, {expected}") == 1, done.stderr[-3000:]


DILOCO = ["--communication.exchange", "diloco", "--communication.local.steps", "5"]


@pytest.mark.parametrize(
    "options, compared", [([], list(range(3, 31, 3))), (DILOCO, [15, 30])], ids=["dense", "diloco"]
)
def test_healthy_replicas_are_compared_without_an_alarm(
    options: list[str], compared: list[int], tmp_path: Path
) -> None:
    """With DiLoCo, replicas are equal only in the steps that synchronise them: every fifth."""
    options = ["--train.replica_check_every", "3", *options]
    done = run_with_faults(tmp_path / "run", "torch", 2, *options, comparisons=str(tmp_path / "comparisons"))
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        lines = (tmp_path / f"comparisons.{rank}").read_text().splitlines()
        fingerprints = dict(json.loads(line) for line in lines)
        assert list(fingerprints) == list(range(3, 31, 3))
        assert [step for step, count in fingerprints.items() if count > 0] == compared


def step(norm: float, skipped: bool = False) -> StepResult:
    return StepResult(1.0, 1.0, norm, skipped=skipped)


def test_a_spike_is_far_above_the_mean_of_applied_norms() -> None:
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


def test_consecutive_skips_or_disagreement_cause_a_rollback() -> None:
    guard = StepGuard(TrainConfig(max_skips=2), replicas_diverge=False)
    assert guard.bad_rows(Votes(), 2) == []
    assert guard.bad_rows(Votes(0, skipped=2), 2) == [] and guard.bad_rows(Votes(8), 2) == []
    assert guard.bad_rows(Votes(16, skipped=2), 2) == [] and guard.bad_rows(Votes(24, skipped=2), 2) == [16, 24]
    guard.rolled_back(1, {})
    assert guard.bad_rows(Votes(32, skipped=1), 2) == [32]
    local_sgd_guard = StepGuard(TrainConfig(max_skips=2), replicas_diverge=True)
    assert local_sgd_guard.bad_rows(Votes(32, skipped=1), 2) == []


def test_a_rollback_restores_the_spike_statistics() -> None:
    guard = StepGuard(TrainConfig(spike=4.0), replicas_diverge=False)
    for _ in range(60):
        guard.add(step(2.0))
    then = guard.state()
    for _ in range(60):
        guard.add(step(7.0))
    guard.rolled_back(60, then)
    assert guard.state() == then and guard.limit == pytest.approx(8.0)


def test_rollbacks_return_to_older_and_older_checkpoints() -> None:
    guard = StepGuard(TrainConfig(), replicas_diverge=False)
    steps = {5, 10, 15}
    assert "there is no checkpoint to go back to" in str(guard.hopeless("bad"))

    def roll_back(at: int) -> int | None:
        left = next(filter(None, (steps - excluded for excluded in guard.excluded(at))), None)
        if left:
            guard.rolled_back(max(left), {})
        return max(left) if left else None

    assert [roll_back(17) for _ in range(4)] == [15, 10, 5, 15]
    assert [roll_back(18), roll_back(18)] == [15, 10]  # the run has come further: the newest may be of use again
    assert [roll_back(18) for _ in range(5)] == [5, 10, 5, None, None]
    assert "bad, and rollbacks to the checkpoint(s) of step 5, 10, 15 did not help: lower" in str(guard.hopeless("bad"))


def test_differences_name_the_minority_or_all_ranks() -> None:
    a, b = {"w": 1, "v": 2}, {"w": 1, "v": 3}
    assert difference([a, a], (0, 1)) is None and difference([{}, {}], (0, 1)) is None
    assert "rank 4 holds other values than the other 2 replica(s) of v:" in difference([a, a, b], (0, 2, 4))
    assert "ranks 0, 1 hold different values, no majority" in difference([a, b], (0, 1))
    assert "of w and 1 more tensor(s)" in difference([a, {"w": 9, "v": 9}], (0, 1))
