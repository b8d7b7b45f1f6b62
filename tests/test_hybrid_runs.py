"""Layouts end to end: training, checkpoints in other layouts and frameworks, evaluation, and failures."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

import hvdlm
from builders import case
from hvdlm.config import ParallelConfig
from hvdlm_inference.trained_run import plan_trained
from launching import ONE_LAYER, SMALL, launch, losses, run_python, with_step_hook

# Two heads for two tensor ranks, two layers for two stages; evaluation has an uneven last batch.
SIZES = [*SMALL, "--train.micro_batch_size", "2", "--train.eval_batch_size", "7", "--train.warmup", "5"]
LAYOUTS = {
    "2x1x2": ["--parallel.data", "2", "--parallel.tensor", "2"],
    "1x2x2": ["--parallel.pipeline", "2", "--parallel.tensor", "2"],
    "1x2x1": ["--parallel.pipeline", "2"],
}


def run(folder: Path, framework: str, ranks: int, *options: str) -> None:
    arguments = ["-m", "hvdlm", "--framework", framework, "--log.run", str(folder), *SIZES, "--train.steps", "24"]
    done = launch("threads", ranks, [*arguments, *options])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def single_rank_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run on one rank of torch."""
    folder = tmp_path_factory.mktemp("one") / "run"
    run(folder, "torch", 1)
    return folder


@pytest.fixture(scope="module")
def half_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of torch on 2 x 1 x 2 ranks, with ZeRO 1, that ended in step 13."""
    folder = tmp_path_factory.mktemp("half") / "run"
    stop = with_step_hook("step == 13 and (self.world.gather_objects(0), time.sleep(0.5), os._exit(0))")
    options = ["--framework", "torch", "--log.run", str(folder), *SIZES, "--train.steps", "24"]
    options += ["--checkpoint.every", "12"]
    launch("threads", 4, [*stop, *options, *LAYOUTS["2x1x2"], "--parallel.zero", "1"])
    return folder


@pytest.mark.parametrize(
    "framework, ranks, layout",
    [
        ("tensorflow", 2, "1x2x1"),
        ("torch", 1, ""),
        case(
            "tensorflow", 4, "1x2x2", covered_by="the case of two stages; the evaluation of tensorflow in this layout"
        ),
    ],
)
def test_a_checkpoint_resumes_in_another_layout_and_framework(
    single_rank_run: Path, half_run: Path, tmp_path: Path, framework: str, ranks: int, layout: str
) -> None:
    shutil.copytree(half_run, tmp_path / "run")
    run(tmp_path / "run", framework, ranks, "--checkpoint.resume", "auto", *LAYOUTS.get(layout, []))
    expected, resumed = losses(single_rank_run), losses(tmp_path / "run")
    assert len(resumed) == len(expected) == 24
    assert max(abs(a - b) for a, b in zip(expected, resumed, strict=True)) < 1e-3
    figures = [
        json.loads((folder / "summary.json").read_text())["val_loss"] for folder in (single_rank_run, tmp_path / "run")
    ]
    assert figures[0] == pytest.approx(figures[1], abs=1e-3)


GENERATE = ["generate", "--prompt", "The ", "--tokens", "16", "--temperature", "0", "--run"]


@pytest.fixture(scope="module")
def generated_alone(single_rank_run: Path) -> str:
    """Return the text that one rank of torch generates."""
    return run_python(["-m", "hvdlm", *GENERATE, str(single_rank_run)]).stdout


# TensorFlow traces every rank of both commands: tests/parallel/test_layouts.py compares its losses and logits on four.
@pytest.mark.parametrize("framework, ranks, layout", [("torch", 4, "1x2x2"), ("tensorflow", 2, "1x2x1")])
def test_evaluation_and_generation_work_in_a_layout(
    single_rank_run: Path, generated_alone: str, framework: str, ranks: int, layout: str
) -> None:
    """Several ranks evaluate the run of one rank and generate the same text."""
    options = [*LAYOUTS[layout], "--framework", framework]
    done = launch("threads", ranks, ["-m", "hvdlm", "evaluate", "--run", str(single_rank_run), *options])
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert figures["val_loss"] == pytest.approx(
        json.loads((single_rank_run / "summary.json").read_text())["val_loss"], abs=1e-4
    )
    together = launch("threads", ranks, ["-m", "hvdlm", *GENERATE, str(single_rank_run), *options])
    assert together.returncode == 0, together.stderr[-3000:]
    assert together.stdout == generated_alone and len(generated_alone) > 16


STAGES = [
    "--parallel.pipeline",
    "2",
    "--parallel.virtual_stages",
    "2",
    "--model.layers",
    "4",
    "--train.batch_size",
    "8",
]
STAGES += ["--train.micro_batch_size", "4"]


@pytest.mark.parametrize("layout", [["--parallel.context", "2"], STAGES], ids=["context", "virtual stages"])
def test_other_numbers_of_ranks_use_a_run(tmp_path: Path, layout: list[str]) -> None:
    """Without options of the layout."""
    run = tmp_path / "run"
    options = [*SMALL, *ONE_LAYER, "--train.steps", "2", "--train.warmup", "0", "--log.run", str(run), *layout]
    done = launch("threads", 2, ["-m", "hvdlm", *options])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    expected = json.loads((run / "summary.json").read_text())["val_loss"]
    assert plan_trained(str(run), None, [], whole=True).config.parallel == ParallelConfig(data=1)  # of lm-eval
    with hvdlm.load(run) as trained:
        assert trained.evaluate()["val_loss"] == pytest.approx(expected, abs=1e-6)
        assert len(trained.generate("The ", 5)) == 9
    done = launch("threads", 3, ["-m", "hvdlm", "evaluate", "--run", str(run)])  # which can't share the training batch
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["val_loss"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_a_run_of_compressed_zero_resumes_exactly(framework: str, tmp_path: Path) -> None:
    """From its first checkpoint, on as many ranks, bit for bit; what is evaluated are the float32 parameters."""
    options = [*SMALL, *ONE_LAYER, "--framework", framework, "--train.steps", "12", "--train.warmup", "2"]
    options += ["--parallel.zero", "1", "--communication.compression.algorithm", "int8", "--checkpoint.every", "4"]
    options += ["--checkpoint.keep", "9"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = launch("threads", 2, ["-m", "hvdlm", "--log.run", str(whole), *options])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    shutil.copytree(whole, killed)
    for step in (8, 12):
        shutil.rmtree(killed / "checkpoints" / f"step-{step:08d}")
    done = launch("threads", 2, ["-m", "hvdlm", "--log.run", str(killed), *options, "--checkpoint.resume", "auto"])
    assert done.returncode == 0 and "steps 4 to 12" in done.stdout, done.stdout[-2000:] + done.stderr[-3000:]
    assert losses(whole) == losses(killed) and len(losses(whole)) == 12
    last = [run / "checkpoints" / "step-00000012" for run in (whole, killed)]
    files = [path.name for path in sorted(last[0].glob("*.safetensors"))]
    assert {"model-0000.safetensors", "model-0001.safetensors"} < set(files)
    for name in files:
        assert last[0].joinpath(name).read_bytes() == last[1].joinpath(name).read_bytes(), name

    # The run's own figure is of the parameters that ranks computed with, which are rounded.
    figures = [json.loads((whole / "summary.json").read_text())["val_loss"]]
    compared = (
        framework == "torch" or "HVDLM_TEST_FULL" in os.environ
    )  # which values commands read doesn't depend on it
    for ranks in (1, 2) if compared else (2,):
        done = launch("threads", ranks, ["-m", "hvdlm", "evaluate", "--run", str(whole)])
        assert done.returncode == 0, done.stderr[-3000:]
        figures.append(json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))["val_loss"])
    assert figures[1] == pytest.approx(figures[-1], abs=1e-6) and figures[0] == pytest.approx(figures[1], abs=0.02)
    if not compared:
        return
    write = ["generate", "--run", str(whole), "--prompt", "The ", "--tokens", "8", "--temperature", "0"]
    alone, together = (launch("threads", ranks, ["-m", "hvdlm", *write]) for ranks in (1, 2))
    assert alone.returncode == together.returncode == 0 and alone.stdout == together.stdout, together.stderr[-3000:]


KILLED = pytest.mark.full(covered_by="torch, and the ranks of tensorflow that fail in test_faults.py")


@pytest.mark.parametrize("framework", ["torch", pytest.param("tensorflow", marks=KILLED)])
def test_a_rank_killed_inside_a_stage_ends_all_ranks(framework: str, tmp_path: Path) -> None:
    soon = "threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()"
    action = f"import threading; step == 3 and self.world.rank == 2 and (print('killed', flush=True), {soon})"
    options = ["--framework", framework, "--log.run", str(tmp_path / "run"), *SIZES, "--train.steps", "100000"]
    began = time.monotonic()
    done = launch("mpirun", 4, [*with_step_hook(action), *options, *LAYOUTS["1x2x2"]], timeout=120)
    assert done.returncode != 0
    assert "killed" in done.stdout and len(losses(tmp_path / "run")) >= 3
    assert "rank 2" in done.stdout + done.stderr and "signal 9" in done.stdout + done.stderr
    assert time.monotonic() - began < 60  # including start-up


def test_the_summary_compares_memory_and_traffic_to_predictions(tmp_path: Path) -> None:
    run(tmp_path / "run", "torch", 4, *LAYOUTS["1x2x2"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["mesh"] == {"data": 1, "pipeline": 2, "tensor": 2} and len(summary["ranks"]) == 4
    for rank in summary["ranks"]:
        assert rank["step_bytes"] == rank["predicted_step_bytes"]
        measured, predicted = rank["memory"], rank["predicted_memory"]
        assert {k: measured[k] for k in ("parameters", "gradients", "optimizer")} == {
            k: predicted[k] for k in ("parameters", "gradients", "optimizer")
        }
        assert measured["activations"] == pytest.approx(predicted["activations"], rel=0.1)
    assert summary["predicted_idle_share"] == pytest.approx(1 / 5) and 0 < summary["idle_share"] < 1
