"""Custom models of plugins (torch.nn.Module, keras.Model) train on data ranks, with compression and checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hvdlm.errors import HvdlmError
from launching import ROOT, install_example, launch, losses

FRAMEWORKS = ["torch", "tensorflow"]
EXAMPLE = {"torch": ("own_torch", "convolutions"), "tensorflow": ("own_keras", "keras_convolutions")}
SIZES = ["--model.layers", "3", "--model.width", "32", "--data.context", "32", "--train.batch_size", "8"]
SIZES += ["--log.every", "1", "--train.warmup", "5", "--train.learning_rate", "0.01"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder into which pip has installed both examples."""
    first, second = (plugin for plugin, _ in EXAMPLE.values())
    return install_example(first, tmp_path_factory.mktemp("examples"), second)


Run = Callable[..., str]


@pytest.fixture
def run(installed: Path) -> Run:
    """Return a function that trains the example of a framework and returns what was printed."""

    def train(framework: str, ranks: int, folder: Path, *options: str, code: int = 0, named: str | None = None) -> str:
        plugin, model = EXAMPLE[framework]
        command = ["-m", "hvdlm", "--plugins", f"[{plugin}]", "--model.name", model, "--log.run", str(folder)]
        command += ["--framework", named or framework, *SIZES, *options]
        # A user's setting of Keras must have no effect.
        other = {"torch": "tensorflow", "tensorflow": "torch"}[framework]
        # A model of Keras computes while its layers are built, before the ranks start.
        variables = {"KERAS_BACKEND": other, "TF_NUM_INTEROP_THREADS": "4"}
        done = launch("threads", ranks, command, PYTHONPATH=str(installed), **variables)
        assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    return train


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_example_has_fewer_than_40_lines(framework: str) -> None:
    plugin, _ = EXAMPLE[framework]
    assert len((ROOT / "examples" / "plugins" / plugin / f"{plugin}.py").read_text().splitlines()) < 40


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_data_ranks_follow_one_rank_and_resume(run: Run, tmp_path: Path, framework: str) -> None:
    output = run(framework, 1, tmp_path / "one", "--train.steps", "30", "--log.sample_tokens", "20")
    assert (
        losses(tmp_path / "one")[-1] < losses(tmp_path / "one")[0] - 0.8 and (tmp_path / "one" / "sample.txt").exists()
    ), output
    options = ["--parallel.zero", "1", "--checkpoint.every", "10"]
    run(framework, 2, tmp_path / "two", "--train.steps", "30", *options)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    old = tmp_path / "two" / "checkpoints" / "step-00000020"
    options = ["--train.steps", "30", "--checkpoint.resume", str(old), "--log.run", str(tmp_path / "three")]
    run(framework, 1, tmp_path / "three", *options)
    assert losses(tmp_path / "three") == pytest.approx(losses(tmp_path / "one")[20:], abs=1e-5)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_compressed_training_with_dropout_learns(run: Run, tmp_path: Path, framework: str) -> None:
    options = ["--communication.compression.algorithm", "top_k", "--communication.compression.ratio", "0.2"]
    options += ["--communication.compression.min_elements", "64", "--model.dropout", "0.1"]
    run(framework, 2, tmp_path / "run", "--train.steps", "30", *options)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["compression"] > 1.5 and losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0] - 0.6


@pytest.mark.parametrize(
    "framework, options, expected",
    [
        ("torch", ["--parallel.tensor", "2"], "a plugin's own module can't be cut into tensor or pipeline ranks"),
        ("torch", ["--train.activation_checkpointing", "true"], "and hvdlm sees none in convolutions"),
        ("tensorflow", ["--train.precision", "bf16"], "Keras layers have a precision of their own"),
    ],
)
def test_options_unsupported_by_custom_modules_are_refused(
    run: Run, tmp_path: Path, framework: str, options: list[str], expected: str
) -> None:
    assert expected in run(framework, 2, tmp_path / "run", "--train.steps", "3", *options, code=2)


def test_a_module_of_the_other_framework_is_refused(run: Run, tmp_path: Path) -> None:
    output = run("torch", 1, tmp_path / "run", "--train.steps", "3", code=2, named="tensorflow")
    assert "convolutions is a module of torch: --framework torch" in output


def test_batch_normalisation_is_refused() -> None:
    import keras
    import torch

    from hvdlm_tensorflow.models import custom_module as of_keras
    from hvdlm_torch.models import custom_module as of_torch

    with pytest.raises(HvdlmError, match="batch normalisation keeps statistics"):
        of_torch.describe(lambda: torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.BatchNorm1d(4)), 5, 4)
    layers = [keras.layers.Embedding(5, 4), keras.layers.BatchNormalization()]
    with pytest.raises(HvdlmError, match="batch normalisation's statistics"):
        of_keras.describe(lambda: keras.Sequential(layers), 5, 4)


def test_initial_values_follow_the_seed_and_nothing_else() -> None:
    import keras
    import torch

    from hvdlm_tensorflow.models import custom_module as of_keras
    from hvdlm_torch.models import custom_module as of_torch

    specs = (
        of_torch.describe(lambda: torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5)), 5, 4),
        of_keras.describe(lambda: keras.Sequential([keras.layers.Embedding(5, 4), keras.layers.Dense(5)]), 5, 4),
    )
    for spec in specs:
        first, second, again = (spec.initial(seed) for seed in (1, 2, 1))
        name = spec.params[0].name
        assert (first[name] == again[name]).all() and (first[name] != second[name]).any()
        assert spec.parameters == 5 * 4 + 4 * 5 + 5 and spec.settings.vocab == 5
        assert (spec.params[1].initial_box(1, (slice(1, 3), slice(0, 5))) == first[spec.params[1].name][1:3]).all()
