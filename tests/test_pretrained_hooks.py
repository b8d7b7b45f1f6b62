"""Folders of pretrained models and formats of exports that plugins add: hvdlm_open_pretrained and hvdlm_export."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hvdlm import cli, hookimpl, plugins
from hvdlm.checkpoints.base_weights import attach, open_pretrained
from hvdlm.config import Config, LoRAConfig
from hvdlm.errors import HvdlmError
from hvdlm.models.lora import adapt
from hvdlm.models.spec import ModelSpec
from hvdlm_language.presets import PRESETS
from launching import environment


class Folder:
    """A folder of another kind; ``hvdlm_open_pretrained`` is its plugin's hook."""

    def attach(self, spec: ModelSpec) -> ModelSpec:
        return spec

    def fingerprint(self) -> str:
        return "the weights"

    @hookimpl
    def hvdlm_open_pretrained(self, path: Path) -> Folder | None:
        return self if path.name == "other" else None


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> Folder:
    """Have every run load a plugin that reads folders named "other"."""
    load, folder = plugins.load, Folder()

    def with_other(names: Any) -> Any:
        manager = load(names)
        manager.register(folder)
        return manager

    monkeypatch.setattr(plugins, "load", with_other)
    return folder


def test_a_plugin_opens_folders_of_its_own_kind(other: Folder, tmp_path: Path) -> None:
    assert open_pretrained(str(tmp_path / "other")) is other
    with pytest.raises(HvdlmError, match="no plugin finds a model there"):
        open_pretrained(str(tmp_path / "nothing"))


def test_adapters_are_added_to_the_weights_of_a_plugins_folder(other: Folder, tmp_path: Path) -> None:
    config = Config()
    spec = adapt(PRESETS["gpt"](config.model, 16, 8), LoRAConfig(rank=2))
    _, base = attach(spec, "other", seed=1)
    assert base is not None and base["weights"] == "the weights"
    with pytest.raises(HvdlmError, match="whose weights adapters are added to, is gone"):
        attach(spec, str(tmp_path / "nothing"), seed=1)


def test_a_format_that_no_plugin_writes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("")
    for name in ("hugingface", "torch"):
        assert cli.main(["convert", "--run", str(tmp_path), "--output", str(tmp_path / "out"), "--format", name]) == 2
        sentence = capsys.readouterr().err
        assert f"--format: no plugin writes {name!r}" in sentence and "huggingface, safetensors" in sentence


def test_a_run_without_a_pretrained_model_imports_no_huggingface() -> None:
    code = (
        "import sys; from hvdlm import cli; assert cli.main(['train', '--dry_run']) == 0\n"
        "loaded = [name for name in sys.modules if name.startswith('hvdlm_huggingface')]; assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
