"""Runs, checkpoints and token folders that version 0.1 wrote open in this version.

``tests/fixtures/v0.1`` holds the folders of six runs of two steps, as 0.1 left them, the data that they read, and the
losses of steps 3 and 4 (``resumed.json``) when 0.1 resumed them on one rank.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from hvdlm.checkpoints.safetensors_io import open_tensors
from launching import launch, losses

WRITTEN = Path(__file__).resolve().parent / "fixtures" / "v0.1"
RUNS = ["torch-gpt", "torch-lstm", "torch-lora", "torch-zero", "tensorflow-gpt"]
RUNS += [pytest.param("tensorflow-lstm", marks=pytest.mark.full(covered_by="torch-lstm and tensorflow-gpt"))]  # type: ignore[list-item]
COMMANDS = "import json, sys; from hvdlm import cli\nfor one in json.loads(sys.argv[1]): assert cli.main(one) == 0, one"


def commands(*lines: list[str], ranks: int = 1) -> str:
    """Run hvdlm's command lines one after the other in one process per rank; return what they printed."""
    done = launch("mpirun", ranks, ["-c", COMMANDS, json.dumps(lines)])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def copied(name: str, folder: Path) -> tuple[Path, list[str]]:
    """Return a copy of a run's folder, and the option that names the data that it was trained on."""
    shutil.copytree(WRITTEN / name, folder / name)
    data = "tokens" if name in ("torch-lora", "torch-zero") else "text.txt"
    return folder / name, ["--data.path", str(WRITTEN / data)]


def resume(run: Path, data: list[str]) -> list[str]:
    """Return the command line that trains a run to step 4."""
    options = ["--log.run", str(run), "--checkpoint.resume", "auto", "--train.steps", "4"]
    return ["train", "--config", str(run / "config.yaml"), *options, *data]


def check_continued(run: Path, before: list[float]) -> None:
    """Check that a run has trained from step 2 to step 4, with the losses that 0.1 gave when it resumed it."""
    after = losses(run)
    assert after[:2] == before
    np.testing.assert_allclose(after[2:], json.loads((WRITTEN / "resumed.json").read_text())[run.name], rtol=1e-5)
    assert json.loads((run / "summary.json").read_text())["steps"] == 4
    assert (run / "checkpoints" / "latest").read_text() == "step-00000004"


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_version_0_1_is_read_and_resumed(name: str, tmp_path: Path) -> None:
    run, data = copied(name, tmp_path)
    recorded, before = json.loads((run / "summary.json").read_text()), losses(run)
    merged = tmp_path / "merged.safetensors"
    printed = commands(
        ["evaluate", "--run", str(run), *data],
        ["generate", "--run", str(run), "--prompt", "The quick", "--tokens", "5", "--temperature", "0", *data],
        ["convert", "--run", str(run), "--output", str(merged)],
        resume(run, data),
    )
    figures = next(json.loads(line) for line in printed.splitlines() if line.startswith("{"))
    assert figures["step"] == 2 and figures["val_loss"] == pytest.approx(recorded["val_loss"], rel=1e-6)
    assert "\nThe quick" in printed
    weights = load_file(merged)
    total = recorded["frozen_parameters"] or recorded["parameters"]
    assert sum(array.size for array in weights.values()) == total
    if name != "torch-lora":
        step = WRITTEN / name / "checkpoints" / "step-00000002"
        stored = open_tensors(step / "model.safetensors", step)
        for key, array in weights.items():
            np.testing.assert_array_equal(array, stored.get_tensor(key), key)
    check_continued(run, before)


def test_shards_of_two_ranks_are_resumed_by_two_ranks(tmp_path: Path) -> None:
    run, data = copied("torch-zero", tmp_path)
    before = losses(run)
    commands([*resume(run, data), "--backend", "mpi"], ranks=2)
    check_continued(run, before)


def test_a_token_folder_of_version_0_1_trains_the_same(tmp_path: Path) -> None:
    """The first two steps on the folder give the losses that 0.1 logged."""
    config, run = WRITTEN / "torch-zero" / "config.yaml", tmp_path / "run"
    options = ["--parallel.zero", "0", "--backend", "auto", "--log.run", str(run)]
    commands(["train", "--config", str(config), "--data.path", str(WRITTEN / "tokens"), *options])
    np.testing.assert_allclose(losses(run), losses(WRITTEN / "torch-zero"), rtol=1e-5)
