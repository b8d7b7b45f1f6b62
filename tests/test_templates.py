"""The templates of examples/plugins, installed with pip, pass their own tests and train."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from launching import SMALL, install_example, launch, losses, run_python

TEMPLATES = ["template_event", "template_compressor", "template_model"]
TEMPLATES += ["template_task", "template_backend", "template_framework"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder into which pip has installed all templates; their copies lie beside it."""
    folder = tmp_path_factory.mktemp("templates")
    return install_example(*TEMPLATES[:1], folder, *TEMPLATES[1:])


def path_with(installed: Path) -> str:
    """Return ``PYTHONPATH`` with the folder of the templates."""
    return os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")])


def train(installed: Path, run: Path, framework: str, *options: str, launcher: str = "threads") -> str:
    command = ["-m", "hvdlm", "--framework", framework, "--log.run", str(run), *SMALL, "--train.warmup", "2", *options]
    done = launch(launcher, 2, command, PYTHONPATH=path_with(installed), HVDLM_TEST_FRAMEWORK="torch")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_the_tests_of_the_templates_pass(installed: Path) -> None:
    copies = [str(installed.parent / name) for name in TEMPLATES]
    command = ["-m", "pytest", "-q", "--rootdir", str(installed.parent), *copies]
    done = run_python(command, PYTHONPATH=path_with(installed), HVDLM_TEST_FRAMEWORK="torch")
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]


def test_the_template_model_has_one_curve_in_both_frameworks(installed: Path, tmp_path: Path) -> None:
    options = ["--plugins", "[template_event,template_model]", "--model.name", "template_ngram", "--train.steps", "30"]
    options += ["--train.learning_rate", "0.01", "--slow_steps.factor", "2.5", "--log.sample_tokens", "12"]
    for framework in ("torch", "tensorflow"):
        train(installed, tmp_path / framework, framework, *options)
        assert len((tmp_path / framework / "sample.txt").read_text()) >= 12
        assert (tmp_path / framework / "slow_steps.jsonl").is_file()
        assert "slow_steps:\n  factor: 2.5\n" in (tmp_path / framework / "config.yaml").read_text()
    curve = losses(tmp_path / "torch")
    assert curve == pytest.approx(losses(tmp_path / "tensorflow"), abs=1e-4) and curve[-1] < curve[0] - 0.5


def test_the_template_compressor_compresses(installed: Path, tmp_path: Path) -> None:
    options = ["--communication.compression.algorithm", "template_compressor", "--train.steps", "20"]
    train(installed, tmp_path / "run", "torch", *options)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 8 < summary["compression"] < 12.9 and losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0] - 0.2


def test_the_template_task_learns_to_add(installed: Path, tmp_path: Path) -> None:
    options = ["--task", "template_task", "--template_task.digits", "1", "--train.steps", "40"]
    train(installed, tmp_path / "run", "torch", *options, "--train.learning_rate", "0.01")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["accuracy"] >= 0 and summary["val_loss"] < losses(tmp_path / "run")[0] - 0.5


def test_the_template_backend_has_the_curve_of_mpi4py(installed: Path, tmp_path: Path) -> None:
    for backend in ("template_backend", "mpi4py"):
        options = ["--backend", backend, "--train.steps", "12", "--parallel.zero", "1"]
        train(installed, tmp_path / backend, "torch", *options, launcher="mpirun")
        assert json.loads((tmp_path / backend / "summary.json").read_text())["backend"] == backend
    assert losses(tmp_path / "template_backend") == pytest.approx(losses(tmp_path / "mpi4py"), abs=1e-6)


@pytest.mark.parametrize("model", ["llama", "lstm"])
def test_the_template_framework_has_the_curve_of_torch(installed: Path, tmp_path: Path, model: str) -> None:
    options = ["--model.name", model, "--train.steps", "12", "--train.micro_batch_size", "2", "--parallel.zero", "2"]
    options += ["--log.sample_tokens", "9"]
    train(installed, tmp_path / "torch", "torch", *options)
    own = ["--backend", "mpi4py"]
    train(installed, tmp_path / "template_framework", "template_framework", *options, *own, launcher="mpirun")
    assert losses(tmp_path / "template_framework") == pytest.approx(losses(tmp_path / "torch"), abs=1e-5)
    samples = [(tmp_path / framework / "sample.txt").read_text() for framework in ("template_framework", "torch")]
    assert samples[0] == samples[1]


def test_the_template_framework_refuses_other_settings(installed: Path, tmp_path: Path) -> None:
    command = ["-m", "hvdlm", "--framework", "template_framework", "--model.name", "qwen3", *SMALL]
    done = run_python([*command, "--log.run", str(tmp_path / "run")], PYTHONPATH=path_with(installed))
    assert done.returncode == 2 and "template_framework has no model.qk_norm: choose" in done.stderr, done.stderr


def test_the_template_framework_conforms(installed: Path, tmp_path: Path) -> None:
    # Not with test_conformance.py: a launch makes the checks of all plugins that it tests, in every framework.
    chosen = "not same_losses and not tensorflow and not torch"
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--hvdlm-plugin", "template_framework", "-k", chosen]
    variables = {"PYTHONPATH": path_with(installed), "HVDLM_TEST_FRAMEWORK": "torch"}
    done = run_python(command, cwd=tmp_path, timeout=600, **variables)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]


def test_a_missing_architecture_is_named(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "half.py").write_text(
        "from dataclasses import replace\nfrom hvdlm import hookimpl\nfrom template_model import make\n\n"
        "def half(*given):\n    return replace(make(*given), implementations={'tensorflow': 'nowhere:X'})\n\n"
        "@hookimpl\ndef hvdlm_models():\n    return {'half': half}\n"
    )
    dist = tmp_path / "half-0.1.dist-info"
    dist.mkdir()
    (dist / "METADATA").write_text("Metadata-Version: 2.1\nName: half\nVersion: 0.1\n")
    (dist / "entry_points.txt").write_text("[hvdlm]\nhalf = half\n")
    expected = {
        "torch": "the architecture 'template_ngram' has no implementation in torch (implemented in tensorflow)",
        "tensorflow": "(nowhere:X) does not import: ModuleNotFoundError: No module named 'nowhere'",
    }
    for framework, sentence in expected.items():
        command = ["-m", "hvdlm", "--framework", framework, "--plugins", "[half]", "--model.name", "half", *SMALL]
        command += ["--log.run", str(tmp_path / framework)]
        done = run_python(command, PYTHONPATH=f"{installed}:{tmp_path}")
        assert done.returncode == 2 and sentence in done.stderr, done.stderr[-2000:]
