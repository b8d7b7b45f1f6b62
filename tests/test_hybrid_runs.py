"""Layouts end to end: the commands of docs/parallelism.md, checkpoints that change layout and framework, failures."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from launching import SMALL, launch, losses, meddled

# Key-value heads enough for two tensor ranks, layers enough for two stages; an uneven last batch in evaluation.
SIZES = [*SMALL, "--train.micro_batch_size", "2", "--train.eval_batch_size", "7", "--train.warmup", "5"]
LAYOUTS = {
    "2x1x2": ["--parallel.data", "2", "--parallel.tensor", "2"],
    "1x2x2": ["--parallel.pipeline", "2", "--parallel.tensor", "2"],
}


def run(folder: Path, framework: str, ranks: int, *options: str) -> None:
    arguments = ["-m", "hvdlm", "--framework", framework, "--log.run", str(folder), *SIZES, "--train.steps", "24"]
    done = launch("mpirun", ranks, [*arguments, *options])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run on one rank of torch."""
    folder = tmp_path_factory.mktemp("one") / "run"
    run(folder, "torch", 1)
    return folder


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of torch on 2 x 1 x 2 ranks, its optimizer shared, that ended in step 13."""
    folder = tmp_path_factory.mktemp("half") / "run"
    stop = meddled("step == 13 and (self.world.gather_objects(0), time.sleep(0.5), os._exit(0))")
    options = ["--log.run", str(folder), *SIZES, "--train.steps", "24", "--checkpoint.every", "12"]
    launch("mpirun", 4, [*stop, *options, *LAYOUTS["2x1x2"], "--parallel.zero", "1"])
    return folder


@pytest.mark.parametrize("framework, ranks, layout", [("tensorflow", 4, "1x2x2"), ("torch", 1, "")])
def test_a_checkpoint_goes_on_in_another_layout_and_framework(
    one: Path, half: Path, tmp_path: Path, framework: str, ranks: int, layout: str
) -> None:
    shutil.copytree(half, tmp_path / "run")
    run(tmp_path / "run", framework, ranks, "--checkpoint.resume", "auto", *LAYOUTS.get(layout, []))
    expected, found = losses(one), losses(tmp_path / "run")
    assert len(found) == len(expected) == 24
    assert max(abs(a - b) for a, b in zip(expected, found, strict=True)) < 1e-3
    figures = [json.loads((folder / "summary.json").read_text())["val_loss"] for folder in (one, tmp_path / "run")]
    assert figures[0] == pytest.approx(figures[1], abs=1e-3)


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_text_is_evaluated_and_written_in_a_layout(one: Path, framework: str) -> None:
    """Four ranks open what one has written, tell its figures, and write its text."""
    layout = [*LAYOUTS["1x2x2"], "--framework", framework]
    done = launch("mpirun", 4, ["-m", "hvdlm", "evaluate", "--run", str(one), *layout])
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert figures["val_loss"] == pytest.approx(json.loads((one / "summary.json").read_text())["val_loss"], abs=1e-4)
    write = ["generate", "--run", str(one), "--prompt", "The ", "--tokens", "16", "--temperature", "0"]
    alone = launch("", 1, ["-m", "hvdlm", *write])
    together = launch("mpirun", 4, ["-m", "hvdlm", *write, *layout])
    assert alone.returncode == together.returncode == 0, together.stderr[-3000:]
    assert together.stdout == alone.stdout


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_a_rank_killed_inside_a_stage_ends_all_ranks(framework: str, tmp_path: Path) -> None:
    soon = "threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()"
    action = f"import threading; step == 3 and self.world.rank == 2 and (print('killed', flush=True), {soon})"
    options = ["--framework", framework, "--log.run", str(tmp_path / "run"), *SIZES, "--train.steps", "100000"]
    began = time.monotonic()
    done = launch("mpirun", 4, [*meddled(action), *options, *LAYOUTS["1x2x2"]], timeout=120)
    assert done.returncode != 0
    assert "killed" in done.stdout and len(losses(tmp_path / "run")) >= 3
    assert "rank 2" in done.stdout + done.stderr and "signal 9" in done.stdout + done.stderr
    assert time.monotonic() - began < 60  # start-up included


def test_a_summary_tells_what_ranks_hold_and_move_beside_what_was_predicted(tmp_path: Path) -> None:
    run(tmp_path / "run", "torch", 4, *LAYOUTS["1x2x2"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["mesh"] == {"data": 1, "pipeline": 2, "tensor": 2} and len(summary["ranks"]) == 4
    for rank in summary["ranks"]:
        assert rank["step_bytes"] == rank["predicted_step_bytes"]
        held, predicted = rank["memory"], rank["predicted_memory"]
        assert {k: held[k] for k in ("parameters", "gradients", "optimizer")} == {
            k: predicted[k] for k in ("parameters", "gradients", "optimizer")
        }
        assert held["activations"] == pytest.approx(predicted["activations"], rel=0.1)
    assert summary["predicted_idle_share"] == pytest.approx(1 / 5) and 0 < summary["idle_share"] < 1
