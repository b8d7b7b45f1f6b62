"""Data and tokenizers of plugins, and training from a token folder without the plugin that reads texts."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from hvdlm.config import DataConfig
from hvdlm.data.token_files import open_tokens
from hvdlm_corpora.preparation import prepare
from launching import losses, run_python

PLUGIN = '''"""Data "numbers:COUNT", and a tokenizer of pairs of characters."""
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hvdlm import hookimpl
from hvdlm.data.corpora import Corpus
from hvdlm.data.token_files import TokenData
from hvdlm.data.tokenizer_base import Tokenizer
from hvdlm.data.tokenizers import ByteTokenizer


class Pairs(Tokenizer):
    def __init__(self, pairs):
        self.pairs, self.vocab = list(pairs), len(pairs)

    @staticmethod
    def train(texts, size):
        text = "".join(texts)
        return Pairs(sorted({text[i : i + 2] for i in range(0, len(text), 2)}))

    @staticmethod
    def load(description):
        return Pairs(description["pairs"])

    def encode(self, text, special=False):
        return np.array([self.pairs.index(text[i : i + 2]) for i in range(0, len(text), 2)], np.int32)

    def decode(self, ids):
        return "".join(self.pairs[i] for i in ids)

    def to_json(self):
        return {"kind": "number_data", "pairs": self.pairs}


class Numbers:
    def check(self, data):
        raise AssertionError("there is no mixture")

    def store_stdin(self, data):
        raise AssertionError("there is no standard input")

    def open(self, data):
        ids = (np.arange(int(data.paths[0].partition(":")[2])) % 256).astype(np.uint16)
        folder = Path("numbers")
        return [Corpus("", 1.0, TokenData(folder, ByteTokenizer(), ids[:-100], ids[-100:], 0, "numbers"))]


@hookimpl
def hvdlm_data_preparer(data):
    return Numbers() if data.paths[0].startswith("numbers:") else None


@hookimpl
def hvdlm_tokenizers():
    return {"number_data": Pairs}
'''
SMALL = ["--model.layers", "1", "--model.width", "8", "--model.heads", "1", "--data.context", "8"]
SMALL += ["--train.steps", "3", "--train.batch_size", "2", "--log.every", "1", "--log.sample_tokens", "0"]
WITHOUT_READERS = "import sys; sys.modules['hvdlm_corpora'] = None; from hvdlm import cli; sys.exit(cli.main({!r}))"


@pytest.fixture
def plugin(tmp_path: Path) -> str:
    """Install the plugin number_data into a folder; return the PYTHONPATH with it."""
    metadata = tmp_path / "number_data-0.1.dist-info"
    metadata.mkdir()
    (tmp_path / "number_data.py").write_text(PLUGIN)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: number-data\nVersion: 0.1\n")
    (metadata / "entry_points.txt").write_text("[hvdlm]\nnumber_data = number_data\n")
    return os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])


def hvdlm(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command, and check that it succeeds."""
    done = run_python(["-m", "hvdlm", *arguments], **variables)
    assert done.returncode == 0, done.stderr
    return done


def test_a_run_trains_on_data_that_a_plugin_prepares(plugin: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    chosen = ["--plugins", "[number_data]", "--data.path", "numbers:2000"]
    hvdlm(*SMALL, *chosen, "--log.run", str(run), PYTHONPATH=plugin)
    assert len(losses(run)) == 3
    assert json.loads((run / "tokenizer.json").read_text()) == {"kind": "byte"}


def test_a_tokenizer_of_a_plugin_is_named_like_its_plugin(plugin: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefgh" * 300)
    run, cache = tmp_path / "run", str(tmp_path / "cache")
    chosen = ["--data.path", str(tmp_path / "a.txt"), "--data.tokenizer", "number_data", "--data.cache", cache]
    hvdlm(*SMALL, *chosen, "--log.run", str(run), PYTHONPATH=plugin)
    assert json.loads((run / "tokenizer.json").read_text())["pairs"] == ["ab", "cd", "ef", "gh"]
    text = hvdlm("generate", "--run", str(run), "--prompt", "ab", "--tokens", "4", PYTHONPATH=plugin).stdout
    assert text.startswith("ab") and len(text.strip()) == 10
    absent = run_python(["-m", "hvdlm", "generate", "--run", str(run), "--prompt", "ab", "--tokens", "4"])
    assert absent.returncode == 2 and "data.tokenizer: 'number_data' is no kind" in absent.stderr


def test_a_token_folder_trains_without_the_readers_of_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text to train on\n" * 100)
    prepare(DataConfig(path=str(tmp_path / "a.txt"), tokenizer="byte"), str(tmp_path / "tokens"))
    run = tmp_path / "run"
    for path, code in ((tmp_path / "tokens", 0), (tmp_path / "a.txt", 2)):
        arguments = [*SMALL, "--data.path", str(path), "--log.run", str(run), "--log.overwrite", "true"]
        done = run_python(["-c", WITHOUT_READERS.format(arguments)])
        assert done.returncode == code, done.stderr
    assert "plugin corpora (hvdlm_corpora.plugin) does not import" in done.stderr
    assert len(losses(run)) == 3 and open_tokens(tmp_path / "tokens").tokenizer.vocab == 256
