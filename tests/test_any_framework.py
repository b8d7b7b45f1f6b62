"""A framework that only a plugin knows: over backend mpi4py, from numpy arrays, on the curve of the others."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from launching import SMALL, launch, losses

SOURCE = Path(__file__).parent / "numpy_framework.py"
RECURRENT = [*SMALL, "--model.name", "rnn", "--train.steps", "12", "--train.warmup", "3", "--train.eval_every", "6"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder in which the plugin numpy_framework is installed."""
    folder = tmp_path_factory.mktemp("installed")
    shutil.copy(SOURCE, folder)
    entries = folder / "numpy_framework-1.dist-info" / "entry_points.txt"
    entries.parent.mkdir()
    (entries.parent / "METADATA").write_text("Name: numpy-framework\nVersion: 1\n")
    entries.write_text("[hvdlm]\nnumpy_framework = numpy_framework\n")
    return str(folder)


def path_with(installed: str) -> str:
    """Return ``PYTHONPATH`` with the folder of the plugin."""
    return os.pathsep.join([installed, os.environ.get("PYTHONPATH", "")])


def train(installed: str, run: Path, framework: str, ranks: int, *options: str) -> list[float]:
    """Train a small recurrent model; return its losses."""
    command = ["-m", "hvdlm", *RECURRENT, "--framework", framework, "--log.run", str(run), *options]
    done = launch("mpirun", ranks, command, PYTHONPATH=path_with(installed))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert json.loads((run / "summary.json").read_text())["framework"] == framework
    return losses(run)


@pytest.mark.parametrize(
    "options",
    [
        ("--data.sampling", "sequential", "--train.micro_batch_size", "2"),
        ("--parallel.zero", "1", "--train.optimizer", "sgd"),
        ("--communication.exchange", "local_sgd", "--communication.local.steps", "3", "--checkpoint.every", "6"),
    ],
    ids=["carried", "zero", "local_sgd"],
)
def test_a_framework_in_numpy_follows_torch_on_2_ranks(
    installed: str, tmp_path: Path, options: tuple[str, ...]
) -> None:
    curve = train(installed, tmp_path / "numpy", "numpy_framework", 2, *options)
    assert json.loads((tmp_path / "numpy" / "summary.json").read_text())["backend"] == "mpi4py"
    expected = train(installed, tmp_path / "torch", "torch", 2, *options)
    assert len(curve) == 12 and curve[-1] < curve[0]
    assert curve == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("first, second", [("torch", "numpy_framework"), ("numpy_framework", "torch")])
def test_a_checkpoint_moves_to_and_from_a_framework_in_numpy(
    installed: str, tmp_path: Path, first: str, second: str
) -> None:
    constant = ("--train.schedule", "constant")
    whole = train(installed, tmp_path / "whole", "torch", 1, *constant)
    begun = train(installed, tmp_path / "moved", first, 2, *constant, "--train.steps", "6")
    resumed = train(installed, tmp_path / "moved", second, 2, *constant, "--checkpoint.resume", "auto")
    assert resumed[:6] == begun and resumed == pytest.approx(whole, abs=1e-5)


def test_a_framework_unknown_to_horovod_gets_no_advice_to_build(installed: str, tmp_path: Path) -> None:
    command = ["-m", "hvdlm", *RECURRENT, "--framework", "numpy_framework", "--log.run", str(tmp_path / "run")]
    done = launch("mpirun", 2, [*command, "--backend", "mpi"], PYTHONPATH=path_with(installed))
    assert done.returncode == 2 and "Horovod has no operations for numpy_framework" in done.stderr, done.stderr
    assert "horovod build" not in done.stderr and "--backend mpi4py" in done.stderr
