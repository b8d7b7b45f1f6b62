"""The Python API: ``hvdlm.Config``, ``train`` and ``load``, on one rank and under launchers."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import hvdlm
from builders import read_json
from hvdlm.configuration.parsing import parse_config
from hvdlm.training.run import plan
from launching import launch, losses, run_python

PROGRAM = str(Path(__file__).with_name("api_program.py"))
OPTIONS = ("--train.steps", "8", "--train.warmup", "2", "--train.eval_every", "4", "--data.validation_share", "0.02")


def run_program(action: str, folder: Path, framework: str, launcher: str = "", ranks: int = 1) -> list[Any]:
    """Return what every rank of ``api_program.py`` got."""
    done = launch(launcher, ranks, [PROGRAM, action, str(folder), framework])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return [read_json(folder / f"result-{rank}.json") for rank in range(ranks)]


@pytest.mark.parametrize(
    "framework, launcher, ranks",
    [("torch", "", 1), ("tensorflow", "", 1), ("tensorflow", "mpirun", 2), ("torch", "horovodrun --gloo", 2)],
)
def test_trainings_follow_one_another_in_one_process(
    framework: str, launcher: str, ranks: int, tmp_path: Path, curve: Callable[..., Path]
) -> None:
    first, *others = run_program("trainings", tmp_path, framework, launcher, ranks)
    assert all(other == first for other in others)  # the result is the same on every rank
    assert first["restored"] and first["step"] == 8
    (status, reason, steps, val_loss, best), second = first["reached"]
    assert (status, reason, steps, best) == ("done", None, 8, val_loss) and second == first["reached"][0]
    assert first["checkpoints"] == [
        str(tmp_path / run / "checkpoints" / "step-00000008") for run in ("first", "second")
    ]
    assert first["metrics"]["val_loss"] == pytest.approx(val_loss, abs=1e-6)
    assert first["text"][0] == first["text"][1] and len(first["text"][0]) == 24
    by_command = curve(framework, ranks, *OPTIONS, launcher=launcher or "mpirun")
    assert losses(tmp_path / "first") == losses(tmp_path / "second") == losses(by_command)
    assert not list(tmp_path.glob("*/flight_recorder")) and not list(tmp_path.glob("*/.lock"))


@pytest.mark.parametrize("framework, launcher, ranks", [("torch", "", 1), ("torch", "mpirun", 2)])
def test_an_exception_of_all_ranks_lets_the_program_continue(
    framework: str, launcher: str, ranks: int, tmp_path: Path
) -> None:
    for result in run_program("failures", tmp_path, framework, launcher, ranks):
        bad_value, no_data, not_finite = result["messages"]
        assert bad_value == "HvdlmError: train.steps is 0, expected 1 or more: set --train.steps."
        assert "none.txt" in no_data and not_finite.startswith("RankError: ")
        assert result["status"] == "done"


def test_a_rank_that_fails_alone_ends_all_of_them(tmp_path: Path) -> None:
    began = time.monotonic()
    done = launch("mpirun", 2, [PROGRAM, "alone", str(tmp_path), "torch"])
    assert done.returncode and time.monotonic() - began < 100
    assert "missing.txt" in done.stderr and not list(tmp_path.glob("result-*.json"))


def test_signals_stop_a_training_and_not_its_program(tmp_path: Path) -> None:
    [result] = run_program("interrupted", tmp_path, "torch")
    status, reason, steps = result["stopped"]
    assert (status, reason) == ("stopped", "signal") and 3 <= steps <= 5
    assert result["resumed"] == ["done", steps + 2]  # in a thread of the program
    assert result["refused"].startswith("hvdlm is in use in this process: ")
    assert result["ended"] == "at once" and result["restored"]


def test_a_configuration_is_loaded_from_files_and_mappings(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: {layers: 3}\ntrain: {steps: 7}\ndata: {mixture: {a.txt: 2}}\n")
    options = {"train.steps": 9, "log": {"run": tmp_path / "run"}, "train": {"clip": np.float32(0.5)}}
    config = hvdlm.Config.load(tmp_path / "run.yaml", options)
    assert (config.model.layers, config.train.steps, config.train.clip) == (3, 9, 0.5)
    assert config.log.run == str(tmp_path / "run") and config.data.mixture == {"a.txt": 2}
    assert hvdlm.Config.load() == hvdlm.Config() and hvdlm.Config.load(config) == config
    assert hvdlm.Config.load(config, {"train.warmup": 0, "train.threads": None}).train.warmup == 0
    parsed = parse_config(["--model.layers", "3", "--train.steps", "9"])
    assert hvdlm.Config.load({"model": {"layers": 3}, "train.steps": 9}) == parsed
    plugin = hvdlm.Config.load({"task": "translation", "translation.beams": 3})
    assert plugin.plugin_options["translation"].beams == 3 and hvdlm.Config.load(plugin) == plugin


@pytest.mark.parametrize(
    "source, sentence",
    [
        ({"train.stepz": 5}, "--train.stepz: there is no such option; did you mean --train.steps?"),
        ({"train": {"steps": "many"}}, "--train.steps: got 'many', expected a whole number."),
        ({"train": 5}, "--train is a section"),
        ({"train.steps": None}, "--train.steps: got null"),
        ("none.yaml", "none.yaml: No such file or directory"),
    ],
    ids=str,
)
def test_a_wrong_option_in_python_is_one_sentence(source: Any, sentence: str) -> None:
    with pytest.raises(hvdlm.HvdlmError) as raised:
        hvdlm.Config.load(source)
    assert sentence in str(raised.value) and "\n" not in str(raised.value)


def test_assigned_values_are_checked_before_training() -> None:
    config = hvdlm.Config()
    config.train.steps = "many"  # type: ignore[assignment]
    with pytest.raises(hvdlm.HvdlmError, match=r"--train\.steps: got 'many', expected a whole number"):
        hvdlm.train(config)
    with pytest.raises(hvdlm.HvdlmError, match=r"takes a hvdlm\.Config, got a dict"):
        hvdlm.train({"train.steps": 5})  # type: ignore[arg-type]


def test_importing_hvdlm_imports_nothing_that_is_not_used() -> None:
    code = "import sys, hvdlm; assert {'Config', 'train', 'load'} <= set(dir(hvdlm)); hvdlm.hookimpl; "
    code += "assert not {'numpy', 'jsonargparse', 'torch', 'hvdlm.training'} & set(sys.modules); hvdlm.train; "
    done = run_python(["-c", code + "assert not {'torch', 'tensorflow', 'keras', 'mpi4py'} & set(sys.modules)"])
    assert done.returncode == 0, done.stderr


def test_keras_that_another_framework_has_loaded_is_refused(
    restored_environment: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loaded = SimpleNamespace(config=SimpleNamespace(backend=lambda: "tensorflow"))
    monkeypatch.setitem(sys.modules, "keras", loaded)
    config = hvdlm.Config.load({"log.run": tmp_path / "run", "communication.compression.algorithm": "int8"})
    with pytest.raises(hvdlm.HvdlmError, match="keras, which this run uses, was loaded for tensorflow"):
        plan(config)
    assert plan(hvdlm.Config.load({"log.run": tmp_path / "run"})).config.framework == "torch"
