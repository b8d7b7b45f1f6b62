"""Errors and first words help people who come from other tools, mistype a folder or forget a plugin."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path

import pytest

from hvdlm import cli, plugins
from hvdlm.config import Config
from hvdlm.configuration import schema
from hvdlm.configuration.parsing import parse_config
from hvdlm.errors import HvdlmError
from hvdlm.io import launcher_env
from hvdlm_inference.trained_run import run_config
from hvdlm_tools import other_tools
from launching import SMALL

KNOWN = schema.types_of({"": Config})


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(arguments) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "option, expected",
    [
        ("--lr", "--train.learning_rate"),
        ("--train.lr", "--train.learning_rate"),
        ("--batch-size", "--train.batch_size"),
        ("--per-device-train-batch-size", "over all ranks"),
        ("--n_layer", "--model.layers"),
        ("--max_seq_length", "--data.context"),
        ("--output_dir", "--log.run"),
        ("--epochs", "--train.epochs"),
        ("--device", "horovodrun -np 2"),
        ("-np", "horovodrun -np 2"),
        ("--report_to", "--plugins '[wandb]'"),
    ],
)
def test_names_of_other_tools_are_translated(option: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused([option, "3"], capsys)
    assert "there is no such option" in error and expected in error


def test_every_translation_is_an_option_of_today() -> None:
    assert set(other_tools._SAME) <= KNOWN.keys()
    assert not {name for name in other_tools._OPTION if name in KNOWN}


def test_keys_of_other_tools_in_yaml_are_translated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("train: {max_steps: 10}\n")
    assert f"--config {path}: --train.max_steps: there is no such option; here it is called --train.steps." in refused(
        ["--config", str(path)], capsys
    )


@pytest.mark.parametrize("text, steps", [("1e3", 1000), ("2.5E3", 2500), ("1000.0", 1000), ("1e+2", 100), ("7", 7)])
def test_exponents_give_whole_numbers(text: str, steps: int, tmp_path: Path) -> None:
    assert parse_config(["--train.steps", text]).train.steps == steps
    assert parse_config([f"--train.micro_batch_size={text}"]).train.micro_batch_size == steps
    (tmp_path / "a.yaml").write_text(f"train: {{steps: {text}}}\n")
    assert parse_config(["--config", str(tmp_path / "a.yaml")]).train.steps == steps


@pytest.mark.parametrize("text", ["1.5", "2.55e1", "1e-3", "1e999999999", "e3", "1e", "-1e3x"])
def test_other_numbers_are_not_whole(text: str) -> None:
    with pytest.raises(HvdlmError, match="expected a whole number"):
        parse_config(["--train.steps", text])


def test_numbers_for_other_types_stay_as_they_are() -> None:
    assert parse_config(["--log.run", "1e3"]).log.run == "1e3"
    assert parse_config(["--train.learning_rate", "1e-3"]).train.learning_rate == 1e-3


@pytest.fixture
def unloaded_plugin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Install a plugin that brings a model, a compressor and a section of options."""
    (tmp_path / "brings_things.py").write_text(
        "from hvdlm import hookimpl\n"
        "@hookimpl\ndef hvdlm_models():\n    return {'mamba': None}\n"
        "@hookimpl\ndef hvdlm_compressors():\n    return {'tiny': None}\n"
        "@hookimpl\ndef hvdlm_options():\n    return {'spikes': dict}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = importlib.metadata.EntryPoint("things", "brings_things", "hvdlm")
    real = plugins.installed
    monkeypatch.setattr(plugins, "installed", lambda: {**real(), "things": entry})


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model.name", "mamba"],
        ["--communication.compression.algorithm", "tiny"],
        ["--spikes.factor", "2"],
        ["--config", "a.yaml"],
    ],
)
def test_what_an_unloaded_plugin_brings_names_it(
    arguments: list[str],
    unloaded_plugin: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("spikes: {factor: 2}\n")
    assert (
        "the installed plugin things brings it: add things to --plugins, for example --plugins '[things]'."
        in refused(arguments, capsys)
    )


def test_a_bare_call_on_a_terminal_prints_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (name for names in launcher_env.VARIABLES.values() for name in names):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert cli.main([]) == 0
    assert "usage: python -m hvdlm [COMMAND]" in capsys.readouterr().out
    trained: list[list[str]] = []
    monkeypatch.setattr("hvdlm.commands.train.main", lambda arguments: trained.append(arguments) or 0)
    assert cli.main(["train"]) == 0 and cli.main(["--train.steps", "1"]) == 0
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    assert cli.main([]) == 0
    assert trained == [[], ["--train.steps", "1"], []]


def test_a_mistyped_run_names_a_similar_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/shakespeare").mkdir(parents=True)
    Path("runs/shakespeare/config.yaml").write_text("{}\n")
    for command in (["generate", "--run"], ["evaluate", "--run"], ["doctor", "--run"], ["report"]):
        for name in ("runs/shakespear", "shakespeare"):
            error = refused([*command, name], capsys)
            assert error.endswith("Did you mean runs/shakespeare?\n") and name in error
        assert "Did you mean" not in refused([*command, "elsewhere"], capsys)
    assert "there is no such folder" in refused(["doctor", "--run", "elsewhere"], capsys)


def test_resuming_nothing_says_that_it_starts_afresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = [*SMALL, "--train.steps", "1", "--checkpoint.resume", "auto"]
    assert cli.main([*options, "--log.run", "runs/first"]) == 0
    assert "runs/first holds no checkpoint yet: the run starts afresh.\n" in capfd.readouterr().out
    shutil.rmtree("runs/first/flight_recorder", ignore_errors=True)
    assert cli.main([*options, "--log.run", "runs/frist"]) == 0
    assert (
        "runs/frist holds no checkpoint yet: the run starts afresh. Did you mean runs/first?\n"
        in capfd.readouterr().out
    )


@pytest.mark.parametrize(("arguments", "expected"), [([], "auto"), (["--backend", "local"], "local")])
def test_a_trained_run_is_used_under_any_launcher(arguments: list[str], expected: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("backend: gloo\n")
    assert run_config(str(tmp_path), arguments).backend == expected
